// The C ABI: no exception leaves it; each becomes a status and one line.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <new>

#include "call.h"
#include "error.h"
#include "folder.h"
#include "wm_kernels.h"

struct wmk_library {
  wmk::Library library;
};

struct wmk_op {
  wmk::Op op;
};

namespace {

constexpr size_t LINE = 1024;
thread_local char last_error[LINE] = "";

wmk_status keep(wmk_status status, const char* line) {
  std::snprintf(last_error, LINE, "%s", line);
  return status;
}

template <typename Body>
wmk_status guarded(Body&& body) {
  try {
    body();
    return WMK_OK;
  } catch (const wmk::Error& error) {
    return keep(error.status, error.what());
  } catch (const std::bad_alloc&) {
    return keep(WMK_FAILED, "no memory left");
  } catch (const std::exception& error) {
    return keep(WMK_FAILED, error.what());
  } catch (...) {
    return keep(WMK_FAILED, "an unknown error");
  }
}

void need(bool given, const char* function) {
  if (!given) throw wmk::refused(std::string(function) + " got a null pointer");
}

}  // namespace

extern "C" {

int32_t wmk_abi_version(void) { return WMK_ABI_VERSION; }

const char* wmk_last_error(void) { return last_error; }

wmk_status wmk_open(const char* folder, wmk_library** library) {
  return guarded([&] {
    need(folder != nullptr && library != nullptr, "wmk_open");
    *library = new wmk_library{wmk::Library(std::string(folder))};
  });
}

void wmk_close(wmk_library* library) {
  if (library == nullptr) return;
  // Without a driver or a context there is nothing to unload here.
  if (library->library.modules.used()) guarded([&] { library->library.modules.unload_current(); });
  delete library;
}

wmk_status wmk_verify(const wmk_library* library) {
  return guarded([&] {
    need(library != nullptr, "wmk_verify");
    for (const wmk::Kernel& kernel : library->library.plans.kernels) {
      for (const wmk::Cubin& cubin : kernel.cubins) {
        if (!cubin.file.empty()) wmk::read_cubin_file(library->library.folder, cubin);
      }
    }
  });
}

wmk_status wmk_find(const wmk_library* library, const wmk_query* query, wmk_op** op) {
  return guarded([&] {
    need(library != nullptr && query != nullptr && op != nullptr, "wmk_find");
    *op = new wmk_op{wmk::find_op(library->library, *query)};
  });
}

void wmk_release(wmk_op* op) { delete op; }

wmk_status wmk_load(const wmk_op* op) {
  return guarded([&] {
    need(op != nullptr, "wmk_load");
    wmk::load(op->op);
  });
}

size_t wmk_output_count(const wmk_op* op) { return op == nullptr ? 0 : op->op.entries[0]->outputs.size(); }

wmk_status wmk_output_layouts(const wmk_op* op, const wmk_tensor* inputs, size_t input_count, wmk_layout* outputs, size_t output_count) {
  return guarded([&] {
    need(op != nullptr && inputs != nullptr && outputs != nullptr, "wmk_output_layouts");
    if (output_count != wmk_output_count(op)) {
      throw wmk::refused(op->op.entries[0]->op + " has " + std::to_string(wmk_output_count(op)) + " outputs, not " +
                         std::to_string(output_count));
    }
    const std::vector<wmk_layout> layouts = wmk::output_layouts(op->op, inputs, input_count);
    std::copy(layouts.begin(), layouts.end(), outputs);
  });
}

wmk_status wmk_scratch_bytes(const wmk_op* op, const wmk_call* call, const char* architecture, size_t* bytes) {
  return guarded([&] {
    need(op != nullptr && call != nullptr && bytes != nullptr, "wmk_scratch_bytes");
    *bytes = wmk::scratch_bytes(op->op, *call, architecture);
  });
}

wmk_status wmk_launch(const wmk_op* op, const wmk_call* call) {
  return guarded([&] {
    need(op != nullptr && call != nullptr, "wmk_launch");
    wmk::launch(op->op, *call);
  });
}

}  // extern "C"
