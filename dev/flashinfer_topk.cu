// What flashinfer.top_k(deterministic=True, tie_break=1) runs for rows of more than 8192 numbers, as a C function over
// FlashInfer's own headers (written against 0.7.2): harness/bench/flashinfer_topk.py calls it. Ties go to the smaller
// index. Build with the folder flashinfer/data/include of its wheel as INCLUDE and their compiler flags:
//   nvcc -std=c++17 -O3 -arch=sm_90a -use_fast_math -DFLASHINFER_ENABLE_F16 -DFLASHINFER_ENABLE_BF16
//     -Xcompiler -fPIC -shared -cudart static -I INCLUDE -o libflashinfer_topk.so dev/flashinfer_topk.cu
#include <cstdint>

#include <flashinfer/math.cuh>
#include <flashinfer/topk.cuh>

namespace {
template <typename T>
int select(void* input, int32_t* index, void* values, uint32_t rows, uint32_t k, uint32_t width, void* state,
           cudaStream_t stream) {
  return static_cast<int>(flashinfer::sampling::TopKDispatch<T, int32_t>(
      static_cast<T*>(input), index, static_cast<T*>(values), rows, k, width,
      static_cast<flashinfer::sampling::RadixRowState*>(state), false, true, flashinfer::sampling::TopKTieBreak::Small,
      stream, false));
}
}  // namespace

// input [rows, width] is bfloat16 if bf16 is not 0, else float32; index and values [rows, k]; state: a zeroed MiB.
// Returns a cudaError_t.
extern "C" int flashinfer_topk(int bf16, void* input, int32_t* index, void* values, uint32_t rows, uint32_t k,
                               uint32_t width, void* state, void* stream) {
  auto queue = static_cast<cudaStream_t>(stream);
  return bf16 ? select<nv_bfloat16>(input, index, values, rows, k, width, state, queue)
              : select<float>(input, index, values, rows, k, width, state, queue);
}
