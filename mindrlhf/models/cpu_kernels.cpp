// The decoder's kernels for a CPU, float32; cpu_kernels.py compiles and wraps them, composed forms are their oracle.

#include "cpu_kernels.h"

#include <utility>

using namespace mindrlhf;

// --- few rows times matrices --------------------------------------------------------------------------------------

namespace {

// Rows that the sums have room for, and columns of a chunk where the rows of the weight are long enough to stream.
constexpr int64_t kMostRows = 64, kMostColumns = 256;

// x @ weight + bias + residual; bias and residual may be null.
struct Product {
  const float *weight, *bias, *residual;
  float* out;
  int64_t outer;

  int64_t chunk() const { return outer <= 1024 ? kMostColumns / 2 : kMostColumns; }
};

void run_products(const float* x, int64_t rows, int64_t inner, const std::vector<Product>& products) {
  std::vector<std::pair<const Product*, int64_t>> chunks;  // a product and its first column
  for (const Product& product : products)
    for (int64_t first = 0; first < product.outer; first += product.chunk()) chunks.emplace_back(&product, first);
  Pool::get().run(chunks.size(), [&](int64_t chunk) {
    const auto [product, first] = chunks[chunk];
    const int64_t outer = product->outer, width = std::min(product->chunk(), outer - first);
    alignas(64) float sums[kMostRows * kMostColumns];  // out's own rows may share their place in the cache
    for (int64_t r = 0; r < rows; ++r) {
      if (product->bias) std::copy_n(product->bias + first, width, sums + r * kMostColumns);
      else std::fill_n(sums + r * kMostColumns, width, 0.0f);
    }
    multiply(rows, inner, width, {x, inner, 1}, product->weight + first, outer, sums, kMostColumns);
    for (int64_t r = 0; r < rows; ++r) {
      const float* row = sums + r * kMostColumns;
      const float* residual = product->residual ? product->residual + r * outer + first : nullptr;
      float* out = product->out + r * outer + first;
      for (int64_t c = 0; c < width; ++c) out[c] = residual ? residual[c] + row[c] : row[c];
    }
  });
}

}  // namespace

// x [M, K], weights [K, N1], [K, N2]..., each with its bias [N] behind it or none -> x @ weight + bias of each.
KERNEL(projections) {
  std::vector<Product> products;
  int input = 1;
  while (input + static_cast<int>(products.size()) < count) {
    const bool biased = ndims[input + 1] == 1;
    products.push_back({INPUT(input), biased ? INPUT(input + 1) : nullptr, nullptr, nullptr, shapes[input][1]});
    input += biased ? 2 : 1;
  }
  for (size_t i = 0; i < products.size(); ++i) products[i].out = OUTPUT(input + i);
  run_products(INPUT(0), shapes[0][0], shapes[0][1], products);
  return 0;
}

// x [M, K], gate and up [K, N] -> silu(x @ gate) * (x @ up) [M, N].
KERNEL(gated_projection) {
  const int64_t rows = shapes[0][0], outer = shapes[1][1];
  thread_local std::vector<float> gate;
  gate.resize(rows * outer);
  float* out = OUTPUT(3);
  run_products(INPUT(0), rows, shapes[0][1],
               {{INPUT(1), nullptr, nullptr, gate.data(), outer}, {INPUT(2), nullptr, nullptr, out, outer}});
  const float* gates = gate.data();
  for_chunks(rows * outer, 4096, [=](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) out[i] *= gates[i] * sigmoid(gates[i]);
  });
  return 0;
}

// x [M, K], weight [K, N], residual [M, N], then bias [N] or none -> residual + x @ weight + bias [M, N].
KERNEL(residual_projection) {
  const float* bias = count == 5 ? INPUT(3) : nullptr;
  run_products(INPUT(0), shapes[0][0], shapes[0][1], {{INPUT(1), bias, INPUT(2), OUTPUT(count - 1), shapes[1][1]}});
  return 0;
}

// --- elementwise ------------------------------------------------------------------------------------------------

// x [.., H], weight [H], epsilon [] -> x / root mean square * weight.
KERNEL(rms_norm) {
  const int64_t width = width_of(ndims, shapes, 0);
  const float *x = INPUT(0), *weight = INPUT(1), epsilon = INPUT(2)[0];
  float* out = OUTPUT(3);
  for_chunks(rows_of(ndims, shapes, 0), rows_per_chunk(width), [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      const float* row = x + r * width;
      const float inverse = 1.0f / std::sqrt(dot(row, row, width) / width + epsilon);
      for (int64_t i = 0; i < width; ++i) out[r * width + i] = row[i] * inverse * weight[i];
    }
  });
  return 0;
}

// x [.., H], weight [H], g [.., H], epsilon [] -> gradients of x and of weight.
KERNEL(rms_norm_gradient) {
  const int64_t width = width_of(ndims, shapes, 0), rows = rows_of(ndims, shapes, 0);
  const float *x = INPUT(0), *weight = INPUT(1), *g = INPUT(2), epsilon = INPUT(3)[0];
  float *dx = OUTPUT(4), *dweight = OUTPUT(5);
  const int64_t size = std::max(rows_per_chunk(width), (rows + 63) / 64);
  std::vector<float> partial((rows + size - 1) / size * width, 0.0f);
  for_chunks(rows, size, [&](int64_t first, int64_t last) {
    float* sums = partial.data() + first / size * width;
    for (int64_t r = first; r < last; ++r) {
      const float *row = x + r * width, *gradient = g + r * width;
      const float inverse = 1.0f / std::sqrt(dot(row, row, width) / width + epsilon);
      float along = 0;
#pragma omp simd reduction(+ : along)
      for (int64_t i = 0; i < width; ++i) along += gradient[i] * weight[i] * row[i];
      along *= inverse * inverse * inverse / width;
      for (int64_t i = 0; i < width; ++i) {
        dx[r * width + i] = gradient[i] * weight[i] * inverse - row[i] * along;
        sums[i] += gradient[i] * row[i] * inverse;
      }
    }
  });
  std::fill_n(dweight, width, 0.0f);
  for (size_t i = 0; i < partial.size(); ++i) dweight[i % width] += partial[i];
  return 0;
}

// gate, up -> silu(gate) * up.
KERNEL(swiglu) {
  const int64_t width = width_of(ndims, shapes, 0), items = rows_of(ndims, shapes, 0) * width;
  const float *gate = INPUT(0), *up = INPUT(1);
  float* out = OUTPUT(2);
  for_chunks(items, 4096, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) out[i] = gate[i] * sigmoid(gate[i]) * up[i];
  });
  return 0;
}

// gate, up, g -> gradients of gate and up.
KERNEL(swiglu_gradient) {
  const int64_t width = width_of(ndims, shapes, 0), items = rows_of(ndims, shapes, 0) * width;
  const float *gate = INPUT(0), *up = INPUT(1), *g = INPUT(2);
  float *dgate = OUTPUT(3), *dup = OUTPUT(4);
  for_chunks(items, 4096, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const float open = sigmoid(gate[i]), silu = gate[i] * open;
      dup[i] = g[i] * silu;
      dgate[i] = g[i] * up[i] * (open + silu * (1.0f - open));
    }
  });
  return 0;
}

// x [M, N] + bias [N].
KERNEL(add_bias) {
  const int64_t rows = shapes[0][0], width = shapes[0][1];
  const float *x = INPUT(0), *bias = INPUT(1);
  float* out = OUTPUT(2);
  for_chunks(rows, rows_per_chunk(width), [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r)
      for (int64_t c = 0; c < width; ++c) out[r * width + c] = x[r * width + c] + bias[c];
  });
  return 0;
}

// g [M, N] -> its sum over the rows [N], the gradient of a bias.
KERNEL(column_sums) {
  const int64_t width = shapes[0][1], rows = shapes[0][0];
  const float* g = INPUT(0);
  float* out = OUTPUT(1);
  for_chunks(width, 64, [&](int64_t first, int64_t last) {
    std::fill(out + first, out + last, 0.0f);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = first; c < last; ++c) out[c] += g[r * width + c];
  });
  return 0;
}

// x [M, heads, D] turned by cos, sin [M, 1, D] of two equal halves; by -sin with direction -1, which is the gradient.
static int rotate_by(float direction, void** params, int* ndims, int64_t** shapes) {
  const int64_t rows = shapes[0][0], heads = shapes[0][1], width = shapes[0][2], half = width / 2;
  const float *x = INPUT(0), *cos = INPUT(1), *sin = INPUT(2);
  float* out = OUTPUT(3);
  for_chunks(rows, rows_per_chunk(heads * width), [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      for (int64_t head = 0; head < heads; ++head) {
        const float* from = x + (r * heads + head) * width;
        float* to = out + (r * heads + head) * width;
        for (int64_t i = 0; i < half; ++i) {
          const float c = cos[r * width + i], s = direction * sin[r * width + i], low = from[i], high = from[half + i];
          to[i] = low * c - high * s;
          to[half + i] = high * c + low * s;
        }
      }
    }
  });
  return 0;
}

KERNEL(rotate) { return rotate_by(1.0f, params, ndims, shapes); }
KERNEL(rotate_gradient) { return rotate_by(-1.0f, params, ndims, shapes); }

// --- the vocabulary ---------------------------------------------------------------------------------------------

constexpr int64_t kBlock = 1024;

// logits [N, V], labels [N] int32, temperature [] -> log-prob of the label, entropy, log of the total, each [N]. A label
// of -1 is in another rank's part of the vocabulary: its logit counts as 0.
KERNEL(target_logprobs) {
  const int64_t rows = shapes[0][0], width = shapes[0][1];
  const float *logits = INPUT(0), inverse = 1.0f / INPUT(2)[0];
  const int32_t* labels = INTEGERS(1);
  float *logprobs = OUTPUT(3), *entropy = OUTPUT(4), *log_totals = OUTPUT(5);
  for_chunks(rows, rows_per_chunk(width), [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      const float *row = logits + r * width, most = maximum(row, width) * inverse;
      double total = 0, weighted = 0;  // of blocks, each summed in float32
      for (int64_t block = 0; block < width; block += kBlock) {
        float shares = 0, products = 0;
#pragma omp simd reduction(+ : shares, products)
        for (int64_t i = block; i < std::min(width, block + kBlock); ++i) {
          const float shifted = row[i] * inverse - most, share = exponential(shifted);
          shares += share;
          products += share * shifted;
        }
        total += shares;
        weighted += products;
      }
      const double log_total = std::log(total);
      const float logit = labels[r] < 0 ? 0 : row[labels[r]] * inverse;
      logprobs[r] = logit - most - log_total;
      entropy[r] = log_total - weighted / total;
      log_totals[r] = most + log_total;
    }
  });
  return 0;
}

// logits, labels, temperature, entropy and log of the total as above, gradients of log-prob and entropy [N] -> of the
// logits [N, V].
KERNEL(target_logprobs_gradient) {
  const int64_t rows = shapes[0][0], width = shapes[0][1];
  const float *logits = INPUT(0), inverse = 1.0f / INPUT(2)[0];
  const int32_t* labels = INTEGERS(1);
  for_chunks(rows, rows_per_chunk(width), [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      const float* row = logits + r * width;
      float* out = OUTPUT(7) + r * width;
      const float entropy = INPUT(3)[r], log_total = INPUT(4)[r];
      const float of_logprob = INPUT(5)[r] * inverse, of_entropy = INPUT(6)[r] * inverse;
      for (int64_t i = 0; i < width; ++i) {
        const float logprob = row[i] * inverse - log_total;
        out[i] = -exponential(logprob) * (of_logprob + of_entropy * (logprob + entropy));
      }
      if (labels[r] >= 0) out[labels[r]] += of_logprob;
    }
  });
  return 0;
}

// logits [S, V], uniform [S], temperature [] -> token [S] int32 by inversion of the cumulative distribution, and its
// log-prob [S]. Sums of blocks first, then inside the one where the threshold is passed.
KERNEL(sample) {
  const int64_t width = shapes[0][1];
  const float inverse = 1.0f / INPUT(2)[0];
  Pool::get().run(shapes[0][0], [&](int64_t r) {
    const float *row = INPUT(0) + r * width, most = maximum(row, width) * inverse;
    const auto share = [&](int64_t i) { return exponential(row[i] * inverse - most); };
    thread_local std::vector<double> sums;
    sums.clear();
    double total = 0;
    for (int64_t first = 0; first < width; first += kBlock) {
      const int64_t last = std::min(width, first + kBlock);
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = first; i < last; ++i) sum += share(i);
      sums.push_back(sum);
      total += sum;
    }
    const double threshold = INPUT(1)[r] * total;
    double passed = 0;
    size_t block = 0;
    while (block + 1 < sums.size() && passed + sums[block] <= threshold) passed += sums[block++];
    const int64_t last = std::min<int64_t>(width, (block + 1) * kBlock);
    int64_t token = -1;
    for (int64_t i = block * kBlock; i < last; ++i) {
      const float one = share(i);
      if (one > 0) token = i;  // where rounding leaves none over the threshold, the last that can be drawn
      if ((passed += one) > threshold) break;
    }
    if (token < 0) token = std::max_element(row, row + width) - row;
    static_cast<int32_t*>(params[3])[r] = token;
    OUTPUT(4)[r] = row[token] * inverse - most - static_cast<float>(std::log(total));
  });
  return 0;
}

// --- the optimizer ------------------------------------------------------------------------------------------------

// x of any shape -> sum of its squares [1], in float64 beyond a chunk.
KERNEL(squared_sum) {
  int64_t items = 1;
  for (int i = 0; i < ndims[0]; ++i) items *= shapes[0][i];
  constexpr int64_t kSize = 16384;
  std::vector<double> sums((items + kSize - 1) / kSize);
  for_chunks(items, kSize, [&](int64_t first, int64_t last) {
    sums[first / kSize] = dot(INPUT(0) + first, INPUT(0) + first, last - first);
  });
  double total = 0;
  for (double sum : sums) total += sum;
  OUTPUT(1)[0] = static_cast<float>(total);
  return 0;
}

// parameter, first and second moment, gradient of any one shape, all in place, the gradient to 0; then scale of the
// gradient, learning rate, beta1, beta2, epsilon, decay, each [] -> nothing of meaning [1].
KERNEL(adamw) {
  int64_t items = 1;
  for (int i = 0; i < ndims[0]; ++i) items *= shapes[0][i];
  float *parameter = OUTPUT(0), *first_moment = OUTPUT(1), *second_moment = OUTPUT(2), *gradient = OUTPUT(3);
  const float scale = INPUT(4)[0], rate = INPUT(5)[0], beta1 = INPUT(6)[0], beta2 = INPUT(7)[0];
  const float epsilon = INPUT(8)[0], decay = INPUT(9)[0];
  for_chunks(items, 16384, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const float g = gradient[i] * scale;
      const float mean = first_moment[i] * beta1 + g * (1.0f - beta1);
      const float square = second_moment[i] * beta2 + g * g * (1.0f - beta2);
      parameter[i] -= rate * (mean / (std::sqrt(square) + epsilon) + decay * parameter[i]);
      first_moment[i] = mean;
      second_moment[i] = square;
      gradient[i] = 0.0f;
    }
  });
  OUTPUT(10)[0] = 0.0f;
  return 0;
}
