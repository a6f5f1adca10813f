"""What a CUDA binary says of itself: for which architecture it is, and how many registers its kernels take."""

import struct

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_CUDA = 190  # machine
_NEW_ABI = 8  # from which the architecture stands in the second byte of the flags
_WITH_SIZE, _REGISTERS = 4, 0x2F  # of an attribute: a format, and "registers of a function"


class CubinError(Exception):
    """Bytes that are no CUDA binary."""


def architecture_of(cubin: bytes) -> str:
    """`sm_90`.

    Raises:
        CubinError: this is no CUDA binary.
    """
    fields = _header(cubin)
    flags = fields[7]
    return f"sm_{flags >> 8 & 0xFF if cubin[8] >= _NEW_ABI else flags & 0xFF}"


def registers_of(cubin: bytes) -> int:
    """Registers of a thread, the most that any function of the binary takes.

    Raises:
        CubinError: this is no CUDA binary, or it does not say.
    """
    fields = _header(cubin)
    start, count, names_at = fields[6], fields[12], fields[13]
    try:
        sections = [_SECTION.unpack_from(cubin, start + index * _SECTION.size) for index in range(count)]
        names = sections[names_at][4]
        found = [number for section in sections if _text(cubin, names + section[0]) == ".nv.info" for number in _registers(cubin, section)]
    except (struct.error, IndexError) as error:
        raise CubinError("a damaged CUDA binary") from error
    if not found:
        raise CubinError("a CUDA binary that does not tell its registers")
    return max(found)


def _registers(cubin: bytes, section: tuple[int, ...]) -> list[int]:
    place, end, found = section[4], section[4] + section[5], []
    while place < end:
        kind, attribute, size = struct.unpack_from("<BBH", cubin, place)
        if kind == _WITH_SIZE and attribute == _REGISTERS:
            found.append(struct.unpack_from("<II", cubin, place + 4)[1])
        place += 4 + (size if kind == _WITH_SIZE else 0)
    return found


def _header(cubin: bytes) -> tuple[int, ...]:
    if len(cubin) < _HEADER.size or cubin[:4] != b"\x7fELF" or (fields := _HEADER.unpack_from(cubin))[2] != _CUDA:
        raise CubinError("no CUDA binary")
    return fields


def _text(data: bytes, place: int) -> str:
    return data[place : data.index(b"\0", place)].decode()
