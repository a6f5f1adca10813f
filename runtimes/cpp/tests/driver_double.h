// A double of libcuda.so.1 for tests: it hands out contexts, "loads" modules from bytes, records every call, and runs next to nothing.
//
// It has the SONAME of the real driver: a program that is linked to it, or has loaded it, gets it from dlopen("libcuda.so.1") too. A
// "cubin" is a text, one line: `cubin <entry point> <bytes of each parameter>...`, which is what the double knows of parameters; anything
// else it refuses.
#ifndef WM_DRIVER_DOUBLE_H
#define WM_DRIVER_DOUBLE_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct double_launch {
  char name[64];
  uint32_t grid[3];
  uint32_t block[3];
  uint32_t shared;
  uint32_t parameters;
  uint32_t programmatic;  // 1: it may start before the launch ahead of it ends
  uint64_t stream;
  uint64_t context;
  uint64_t values[130];  // as the kernel would read them, 4-byte ones zero-extended
} double_launch;

// Forget everything: no context is current in this thread, capability is 9.0, nothing is recorded. Modules stay loaded.
void double_reset(void);
// Make context number n (from 1) current in this thread; 0: none.
void double_set_context(uint64_t context);
void double_set_capability(int major, int minor);
void double_set_shared_optin(int bytes);
void double_set_threads_of_block(int threads);
void double_set_capturing(int capturing);
// The n-th call of this driver function from now on fails with CUDA_ERROR_UNKNOWN; n = 0: none does.
void double_fail(const char* function, int n);
// Record launches (the default) or only count them.
void double_set_recording(int recording);
// Run what it can on host memory: copies, and kernels named `add`, float32 a + b with parameters (a, b, out, n).
void double_set_running(int running);

// How often the function was called since the last reset.
int64_t double_calls(const char* function);
int64_t double_launches(void);
// The launch of that number since the last reset; null beyond them.
const double_launch* double_launch_at(int64_t index);
// Copies of the last reset: (to, from, bytes, stream) of number `index`; 0 if there is no such.
int double_copy_at(int64_t index, uint64_t* values);
// Modules that are loaded now, and the most dynamic shared memory that was asked for last.
int64_t double_modules(void);
int64_t double_shared_asked(void);

#ifdef __cplusplus
}
#endif
#endif
