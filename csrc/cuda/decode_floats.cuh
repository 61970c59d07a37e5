// Decode's products of three tokens and more: floating point, on weights that are not rounded.
//
// x lies in shared memory as it is. The tensor cores are given 2^b + code; once a group the sums are scaled:
//     total += scale * (sum x (offset + code) - (offset + zero) * sum x)
// The second sum is a product with ones: the tensor cores are idle, and it lands in the lanes that need it.
#pragma once

#include "reduce.cuh"

namespace woq {

template <class T, int BITS, int TOKEN_TILES, int UNITS>
struct FloatTurn {
  using C = Codes<T, BITS>;
  static constexpr int residents = TOKEN_TILES <= 2 ? 2 : 1;  // thread blocks a processor must have registers for
  static constexpr int tiles = TOKEN_TILES == 1 ? 4 : 2;      // row tiles at a time: what registers allow
  float total[kRowTiles][TOKEN_TILES][4];

  struct Order {  // x is in the weight's order
    __device__ Order(const DecodeArgs&, int, int) {}
  };

  // Where this lane's operands of x lie. ldmatrix: lane l addresses row l % 8 (a token; rows past m repeat the last and are
  // dropped) and 8 inputs of matrix l / 8.
  struct Input {
    uint32_t row[TOKEN_TILES];
    __device__ Input(const DecodeArgs& a, const DecodeLayout& layout, uint32_t base, int lane) {
#pragma unroll
      for (int c = 0; c < TOKEN_TILES; ++c) row[c] = base + layout.x + min(8 * c + lane % 8, a.m - 1) * layout.x_stride + lane / 8 * 16;
    }
  };

  // x[:, 64 first .. 64 last) to shared memory, zero beyond k. `barrier` has not been used.
  __device__ static void stage(const DecodeArgs& a, const DecodeLayout& layout, uint8_t* shared, uint32_t barrier, int first, int last, const Order&) {
    const T* x = static_cast<const T*>(a.x);
    uint8_t* x_shared = shared + layout.x;
#if HOPPER
    if (a.k % kBlock == 0) {
      const int bytes = (last - first) * kBlock * 2;
      if (threadIdx.x < 32) {
        if (elect()) {
          barrier_expect(barrier, a.m * bytes);
          for (int row = 0; row < a.m; ++row)
            bulk_copy(smem_address(x_shared) + row * layout.x_stride, x + static_cast<int64_t>(row) * a.k + first * kBlock, bytes, barrier, keep_policy());
        }
        __syncwarp();
      }
      barrier_wait(barrier, 0);
      return;
    }
#endif
    const bool vectors = a.k % 8 == 0;
    const int width = vectors ? 8 : 1, columns = (last - first) * kBlock / width;
    // Thread i takes elements i, i + blockDim, ..., without dividing by the row length each time.
    int row = threadIdx.x / columns, column = threadIdx.x % columns;
    while (row < a.m) {
      const int k = first * kBlock + column * width;
      const T* from = x + static_cast<int64_t>(row) * a.k;
      uint8_t* to = x_shared + row * layout.x_stride + column * width * 2;
      if (vectors) {
        // cp.async keeps all of a thread's loads in flight at once, without registers
        copy16_async(smem_address(to), from + min(k, a.k - 8), k < a.k ? 16 : 0);
      } else {
        *reinterpret_cast<T*>(to) = k < a.k ? from[k] : Float16<T>::round(0.f);
      }
      for (column += blockDim.x; column >= columns; column -= columns) ++row;
    }
    copy_commit();
    copy_wait<0>();
    __syncthreads();
  }

  // Add UNITS units of one group, from unit `from` (0 or 1) of the slice's block `first` on, whose weights lie at `block`;
  // UNITS == 4 is `blocks` <= 2 blocks.
  __device__ void chunk(const DecodeArgs& a, const uint8_t* block, int blocks, int from, const uint8_t* group, const Input& input, int first, int lane) {
    uint32_t x[TOKEN_TILES];
#pragma unroll
    for (int c = 0; c < TOKEN_TILES; ++c) x[c] = input.row[c] + first * kBlock * 2;
    float inputs[TOKEN_TILES][4] = {};
#pragma unroll
    for (int first_tile = 0; first_tile < kRowTiles; first_tile += tiles) {
      float codes[tiles][TOKEN_TILES][4] = {};
#pragma unroll
      for (int b = 0; b < (UNITS == 4 ? 2 : 1); ++b) {
        if (b < blocks) {
          uint32_t words[tiles][C::words];
#pragma unroll
          for (int half = UNITS == 1 ? from : 0; half < (UNITS == 1 ? from + 1 : 2); ++half) {
            if (BITS == 8 || UNITS == 1 || half == 0)
#pragma unroll
              for (int t = 0; t < tiles; ++t) C::load(words[t], block + b * C::block_bytes, first_tile + t, half, lane);
            uint32_t right[TOKEN_TILES][4];
#pragma unroll
            for (int c = 0; c < TOKEN_TILES; ++c) load_matrices(right[c], x[c] + (b * kBlock + half * 32) * 2);
#pragma unroll
            for (int j = 0; j < 2; ++j) step(words, codes, inputs, right, first_tile == 0, 2 * half + j);
          }
        }
      }
      const GroupScales<tiles> g(a, group, C::offset, first_tile, lane);
#pragma unroll
      for (int t = 0; t < tiles; ++t)
#pragma unroll
        for (int c = 0; c < TOKEN_TILES; ++c)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int row = 2 * t + e / 2;
            total[first_tile + t][c][e] += g.scale[row] * (codes[t][c][e] - g.zero[row] * inputs[c][e]);
          }
    }
  }

  // Lane l holds rows l / 4 and l / 4 + 8 of a tile, tokens 2 (l % 4) and the next.
  __device__ void store(const DecodeArgs& a, float* partial, int stride, int lane) const {
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t)
#pragma unroll
      for (int c = 0; c < TOKEN_TILES; ++c)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int token = 8 * c + 2 * (lane % 4) + e % 2, row = 16 * t + lane / 4 + 8 * (e / 2);
          if (token < a.m) partial[token * stride + row] = total[t][c][e];
        }
  }

 private:
  // One k-step of 16 inputs.
  __device__ static void step(const uint32_t (&words)[tiles][C::words], float (&codes)[tiles][TOKEN_TILES][4], float (&inputs)[TOKEN_TILES][4],
                              const uint32_t (&right)[TOKEN_TILES][4], bool sum_inputs, int j) {
    const uint32_t ones[4] = {Float16<T>::ones, Float16<T>::ones, Float16<T>::ones, Float16<T>::ones};
    if (sum_inputs)
#pragma unroll
      for (int c = 0; c < TOKEN_TILES; ++c) mma<T>(inputs[c], ones, right[c][2 * (j & 1)], right[c][2 * (j & 1) + 1]);
#pragma unroll
    for (int t = 0; t < tiles; ++t) {
      uint32_t fragment[4];
      C::fragment(fragment, words[t], j);
#pragma unroll
      for (int c = 0; c < TOKEN_TILES; ++c) mma<T>(codes[t][c], fragment, right[c][2 * (j & 1)], right[c][2 * (j & 1) + 1]);
      if constexpr (C::split) {
        C::template fragment<1>(fragment, words[t], j);
#pragma unroll
        for (int c = 0; c < TOKEN_TILES; ++c) mma<T>(codes[t][c], fragment, right[c][2 * (j & 1)], right[c][2 * (j & 1) + 1]);
      }
    }
  }
};

}  // namespace woq
