/* libwm_kernels: runs the kernels of a bundle from data alone, without Python, Triton or a compiler.

   A bundle's folder `kernels/` holds plans.json (which kernels make one call of an op, on which grids, with which arguments, as integer
   expressions over dimensions) and cubins. This library opens it, finds what serves a call, says how large its outputs and its scratch are,
   and launches it on the caller's stream:

       wmk_library* library;
       wmk_op* op;
       if (wmk_open("model.bundle/kernels", &library) || wmk_find(library, &query, &op)) fail(wmk_last_error());
       wmk_output_layouts(op, inputs, input_count, layouts, output_count);      shapes of the outputs, which the caller allocates
       wmk_scratch_bytes(op, &call, NULL, &bytes);                              scratch, which the caller allocates too
       wmk_launch(op, &call);

   Memory. The library allocates none on the device. Tensors are contiguous. Pointers are device pointers of the current CUDA context.
   Threads. All functions but wmk_close and wmk_release may be called from any number of threads at once. After the first call of a variant
   in a context, wmk_launch takes no lock and allocates nothing, so that it can be captured in a CUDA graph; a first call under capture is
   refused. Errors. Functions return WMK_OK or another wmk_status and leave one line for wmk_last_error. A call that is refused (every
   status but WMK_FAILED) has launched nothing. CUDA. libcuda.so.1 is loaded when it is first needed; opening, finding, layouts and
   wmk_verify work on machines that have none. */
#ifndef WM_KERNELS_H
#define WM_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define WMK_ABI_VERSION 1
#define WMK_MAX_RANK 8
#define WMK_API __attribute__((visibility("default")))

typedef enum wmk_status {
  WMK_OK = 0,
  WMK_DAMAGED = 1,     /* a file of the folder is missing, damaged or of another schema */
  WMK_REFUSED = 2,     /* the call does not fit the plans: op, dtypes, shapes, pointers, scratch */
  WMK_UNAVAILABLE = 3, /* no CUDA driver, no current context, or a device that the plans are not for */
  WMK_FAILED = 4,      /* the driver refused something; earlier launches of the call may have run */
} wmk_status;

typedef enum wmk_dtype {
  WMK_ABSENT = 0, /* an optional input that is not given */
  WMK_FLOAT32 = 1,
  WMK_FLOAT16 = 2,
  WMK_BFLOAT16 = 3,
  WMK_FLOAT64 = 4,
  WMK_INT64 = 5,
  WMK_INT32 = 6,
  WMK_INT16 = 7,
  WMK_INT8 = 8,
  WMK_UINT8 = 9,
  WMK_BOOL = 10,
} wmk_dtype;

typedef struct wmk_library wmk_library; /* an open folder; read only, shared by threads */
typedef struct wmk_op wmk_op;           /* the entries that serve one kind of call */

/* A plain argument of an op: an integer (a bool is 0 or 1), or a text (a float is Python's repr of it, "1e-06"). */
typedef struct wmk_argument {
  const char* name;
  const char* text; /* NULL: an integer */
  int64_t integer;
} wmk_argument;

/* What selects the entries of an op: plain arguments in any order, and the dtype of every input, in the op's order. */
typedef struct wmk_query {
  const char* op; /* "wm::ssd_scan" */
  const wmk_argument* arguments;
  size_t argument_count;
  const int32_t* input_dtypes; /* wmk_dtype; WMK_ABSENT for an input that is not given */
  size_t input_count;
} wmk_query;

/* A contiguous tensor on the device. One with no elements may have data NULL; of an absent input only dtype WMK_ABSENT is looked at. */
typedef struct wmk_tensor {
  void* data;
  const int64_t* shape;
  int32_t rank;
  int32_t dtype;
} wmk_tensor;

typedef struct wmk_layout {
  int64_t shape[WMK_MAX_RANK];
  int32_t rank;
  int32_t dtype;
} wmk_layout;

/* One call. Outputs that may alias an input (a state) are updated in place where both have one address; where the addresses differ, the
   input stays as it is. Any other overlap of an output with a tensor is refused. */
typedef struct wmk_call {
  const wmk_tensor* inputs;
  size_t input_count;
  const wmk_tensor* outputs;
  size_t output_count;
  void* scratch; /* aligned to 256 bytes; must live until the launches have run */
  size_t scratch_bytes;
  void* stream; /* CUstream or cudaStream_t; NULL is the default stream */
} wmk_call;

/* WMK_ABI_VERSION of the library that is loaded. */
WMK_API int32_t wmk_abi_version(void);

/* The line of this thread's last call that did not return WMK_OK; never NULL, valid until the thread's next call. */
WMK_API const char* wmk_last_error(void);

/* Open a folder `kernels/`. plans.json is read and checked as a whole; cubins are read when they are first needed. */
WMK_API wmk_status wmk_open(const char* folder, wmk_library** library);

/* Close it, once no thread uses it or its ops. Modules of the current context are unloaded; those of others stay until their context ends.
 */
WMK_API void wmk_close(wmk_library* library);

/* Read every cubin and compare size and SHA-256. */
WMK_API wmk_status wmk_verify(const wmk_library* library);

/* The entries for these arguments, dtypes and absent inputs. Release the op before its library is closed. */
WMK_API wmk_status wmk_find(const wmk_library* library, const wmk_query* query, wmk_op** op);
WMK_API void wmk_release(wmk_op* op);

/* Load the kernels of all variants of an op for the current context's device, so that no later call has to. */
WMK_API wmk_status wmk_load(const wmk_op* op);

/* Number of outputs of an op. */
WMK_API size_t wmk_output_count(const wmk_op* op);

/* Shapes and dtypes of the outputs; data pointers of the inputs are not looked at. */
WMK_API wmk_status wmk_output_layouts(const wmk_op* op, const wmk_tensor* inputs, size_t input_count, wmk_layout* outputs,
                                      size_t output_count);

/* Bytes of scratch that a call needs; scratch, scratch_bytes and stream are not looked at.
   architecture: "sm_90", or NULL for that of the current context's device. */
WMK_API wmk_status wmk_scratch_bytes(const wmk_op* op, const wmk_call* call, const char* architecture, size_t* bytes);

/* Launch a call on its stream, in the current context. */
WMK_API wmk_status wmk_launch(const wmk_op* op, const wmk_call* call);

#ifdef __cplusplus
}
#endif
#endif
