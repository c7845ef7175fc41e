// What the CPU kernels are made of: threads, sums, exp, and few rows times a matrix.
//
// Work is cut into chunks by its sizes alone, never by the number of threads, and a row's sums always run in the same
// order: a result depends neither on the threads nor on which slot or batch a row is in.

#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

namespace mindrlhf {

// Threads of our own: libgomp's workers spin between regions and take the cores from MindSpore's. Here the caller works
// too and waits only for chunks already begun, so a helper that the system does not schedule delays nobody.
class Pool {
 public:
  static Pool& get() {
    static Pool* pool = new Pool;  // never destroyed: a helper may wait on it while the process ends
    return *pool;
  }

  template <class Body>
  void run(int64_t chunks, const Body& body) {
    std::unique_lock<std::mutex> only(busy_, std::try_to_lock);
    if (chunks < 2 || helpers_ == 0 || !only) {
      for (int64_t chunk = 0; chunk < chunks; ++chunk) body(chunk);
      return;
    }
    call_ = [](const void* context, int64_t chunk) { (*static_cast<const Body*>(context))(chunk); };
    context_ = &body;
    unfinished_.store(chunks, std::memory_order_relaxed);
    unclaimed_.store(chunks, std::memory_order_release);
    jobs_.fetch_add(1);
    jobs_.notify_all();
    work();
    while (unfinished_.load(std::memory_order_acquire) > 0) std::this_thread::yield();
  }

 private:
  Pool() {
    const char* limit = std::getenv("OMP_NUM_THREADS");
    const int threads = limit && std::atoi(limit) > 0 ? std::atoi(limit) : std::thread::hardware_concurrency();
    helpers_ = std::max(0, threads - 1);
    for (int i = 0; i < helpers_; ++i) std::thread([this] { help(); }).detach();
  }

  // A claimed chunk keeps its job alive, so the job's fields may be read after the claim.
  void work() {
    int64_t left = unclaimed_.load(std::memory_order_acquire);
    while (left > 0) {
      if (!unclaimed_.compare_exchange_weak(left, left - 1, std::memory_order_acq_rel)) continue;
      call_(context_, left - 1);
      unfinished_.fetch_sub(1, std::memory_order_acq_rel);
      left = unclaimed_.load(std::memory_order_acquire);
    }
  }

  void help() {
    for (uint32_t seen = jobs_.load();; seen = jobs_.load()) {
      work();
      for (int spin = 0; spin < kSpins && jobs_.load(std::memory_order_relaxed) == seen; ++spin) {
#ifdef __x86_64__
        __builtin_ia32_pause();
#endif
      }
      jobs_.wait(seen);
    }
  }

  static constexpr int kSpins = 1000;  // some 20 us: about the time between two kernels of a decode step
  std::mutex busy_;
  std::atomic<uint32_t> jobs_{0};
  std::atomic<int64_t> unclaimed_{0}, unfinished_{0};
  void (*call_)(const void*, int64_t) = nullptr;
  const void* context_ = nullptr;
  int helpers_ = 0;
};

// body(first, last) over [0, items) in chunks of `size` items.
template <class Body>
void for_chunks(int64_t items, int64_t size, const Body& body) {
  Pool::get().run((items + size - 1) / size,
                  [&](int64_t chunk) { body(chunk * size, std::min(items, (chunk + 1) * size)); });
}

// Rows a chunk where a row costs `cost` elementwise operations: small work stays on one thread.
inline int64_t rows_per_chunk(int64_t cost) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, cost)); }

constexpr int kLanes = 16;
typedef float Vector __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef float Half __attribute__((vector_size(kLanes * 2)));
typedef float Quarter __attribute__((vector_size(kLanes)));

// exp to 2 units in the last place, 0 under -87; a form that the compiler vectorises. NaN stays NaN.
inline float exponential(float x) {
  const float clamped = x > 88.0f ? 88.0f : x;
  const float rounded = clamped * 1.44269504f + 12582912.0f;  // the low bits now hold the integer
  const float power = rounded - 12582912.0f;
  const float rest = (clamped - power * 0.693359375f) + power * 2.12194440e-4f;
  float series = 1.9875691500e-4f;
  series = series * rest + 1.3981999507e-3f;
  series = series * rest + 8.3334519073e-3f;
  series = series * rest + 4.1665795894e-2f;
  series = series * rest + 1.6666665459e-1f;
  series = series * rest + 5.0000001201e-1f;
  series = series * rest * rest + rest + 1.0f;
  int32_t bits;
  std::memcpy(&bits, &rounded, 4);
  bits = (bits + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, 4);
  return x < -87.0f ? 0.0f : series * scale;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

inline float dot(const float* a, const float* b, int64_t count) {
  Vector lanes = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) lanes += *(const Vector*)(a + i) * *(const Vector*)(b + i);
  float sum = 0;
  for (; i < count; ++i) sum += a[i] * b[i];
  Half halves[2];
  std::memcpy(halves, &lanes, sizeof lanes);
  halves[0] += halves[1];
  Quarter quarters[2];
  std::memcpy(quarters, halves, sizeof quarters);
  quarters[0] += quarters[1];
  return sum + ((quarters[0][0] + quarters[0][1]) + (quarters[0][2] + quarters[0][3]));
}

inline float maximum(const float* x, int64_t count) {
  float most = x[0];
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < count; ++i) most = x[i] > most ? x[i] : most;
  return most;
}

// x becomes exp(x - most); returns the sum of it.
inline float exponentials(float* x, int64_t count, float most) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += x[i] = exponential(x[i] - most);
  return sum;
}

inline int64_t rows_of(const int* ndims, int64_t** shapes, int input) {
  int64_t rows = 1;
  for (int i = 0; i + 1 < ndims[input]; ++i) rows *= shapes[input][i];
  return rows;
}

inline int64_t width_of(const int* ndims, int64_t** shapes, int input) { return shapes[input][ndims[input] - 1]; }

// --- products of matrices -----------------------------------------------------------------------------------------

constexpr int kVectors = 2, kPanel = kLanes * kVectors;  // columns in registers at a time
constexpr int kTileRows = 8, kDepth = 256, kPrefetch = 2 * kPanel;
// A matrix inside an array: element (r, c) at data[r * row + c * column].
struct Matrix {
  const float* data;
  int64_t row, column;
};

// out [ROWS, kPanel] += x [ROWS, depth] @ weight [depth, kPanel]; out and weight given by their row strides.
template <int ROWS>
void tile(Matrix x, const float* weight, int64_t stride, int64_t depth, float* out, int64_t out_stride) {
  Vector sums[ROWS][kVectors];
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < kVectors; ++v) sums[r][v] = *(const Vector*)(out + r * out_stride + v * kLanes);
  for (int64_t k = 0; k < depth; ++k) {
    Vector columns[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      columns[v] = *(const Vector*)(weight + k * stride + v * kLanes);
      __builtin_prefetch(weight + k * stride + v * kLanes + kPrefetch);  // the panels that come next
    }
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < kVectors; ++v) sums[r][v] += columns[v] * x.data[r * x.row + k * x.column];
  }
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < kVectors; ++v) *(Vector*)(out + r * out_stride + v * kLanes) = sums[r][v];
}

inline void tile_rows(int64_t rows, Matrix x, const float* weight, int64_t stride, int64_t depth, float* out,
                      int64_t out_stride) {
  using Tile = void (*)(Matrix, const float*, int64_t, int64_t, float*, int64_t);
  static const Tile tiles[] = {tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>, tile<7>, tile<8>};
  for (int64_t r = 0; r < rows; r += kTileRows) {
    tiles[std::min<int64_t>(kTileRows, rows - r) - 1]({x.data + r * x.row, x.row, x.column}, weight, stride, depth,
                                                      out + r * out_stride, out_stride);
  }
}

// out [rows, width] += x [rows, inner] @ weight [inner, width]; out and weight given by their row strides. Each sum
// runs over inner in order, whatever the tile.
inline void multiply(int64_t rows, int64_t inner, int64_t width, Matrix x, const float* weight, int64_t stride,
                     float* out, int64_t out_stride) {
  for (int64_t k = 0; k < inner; k += kDepth) {
    const int64_t depth = std::min<int64_t>(kDepth, inner - k);
    const Matrix part = {x.data + k * x.column, x.row, x.column};
    const float* block = weight + k * stride;
    int64_t column = 0;
    for (; column + kPanel <= width; column += kPanel) {
      tile_rows(rows, part, block + column, stride, depth, out + column, out_stride);
    }
    const int64_t rest = width - column;
    if (rest == 0) continue;
    float narrow[kDepth][kPanel], sums[kTileRows][kPanel];  // the last panel, in padded copies
    for (int64_t i = 0; i < depth; ++i) {
      std::fill_n(std::copy_n(block + i * stride + column, rest, narrow[i]), kPanel - rest, 0.0f);
    }
    for (int64_t r = 0; r < rows; r += kTileRows) {
      const int64_t count = std::min<int64_t>(kTileRows, rows - r);
      for (int64_t i = 0; i < count; ++i) {
        std::fill_n(std::copy_n(out + (r + i) * out_stride + column, rest, sums[i]), kPanel - rest, 0.0f);
      }
      tile_rows(count, {part.data + r * x.row, x.row, x.column}, narrow[0], kPanel, depth, sums[0], kPanel);
      for (int64_t i = 0; i < count; ++i) std::copy_n(sums[i], rest, out + (r + i) * out_stride + column);
    }
  }
}

}  // namespace mindrlhf

#define KERNEL(name) \
  extern "C" int name(int count, void** params, int* ndims, int64_t** shapes, const char**, void*, void*)
#define INPUT(i) static_cast<const float*>(params[i])
#define INTEGERS(i) static_cast<const int32_t*>(params[i])
#define OUTPUT(i) static_cast<float*>(params[i])
