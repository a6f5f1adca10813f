"""The exceptions of wm-graph: one line each, naming what came, what was expected and what to do."""


class WmError(Exception):
    """Base of every error that a user can cause or meet; `exit_code` is what the `wm` command returns for it."""

    exit_code = 2


class ConfigError(WmError):
    """A model configuration, preset name or option that cannot be used."""


class CheckpointError(WmError):
    """A checkpoint, import source or tokenizer that is missing, damaged or does not fit its configuration."""


class BundleError(WmError):
    """A bundle that is missing, damaged or was tampered with."""


class InputError(WmError):
    """Tokens, lengths, rows or sampling options that a session refuses; the session's state is unchanged."""


class CapacityError(InputError):
    """More tokens than the session's capacity; the session's state is unchanged."""


class ExportError(WmError):
    """A model that cannot be exported as asked."""


class BudgetError(WmError):
    """Numbers outside their budget."""

    exit_code = 1


class RuntimeUnavailableError(WmError):
    """A runtime that exists but cannot run here or cannot run this bundle; the message says why."""

    exit_code = 3
