// Attention: of a decode step over the cache, and of whole rows with its gradient.

#include "cpu_kernels.h"

using namespace mindrlhf;

// query [S, Hq*D], key and value [S, Hkv*D] of the new tokens, not yet turned; positions [S] int32; cos, sin [S, 1, D];
// caches [S*Hkv*L, D], written in place at the positions; scale [] -> [S, Hq*D]. Only what a slot holds is read.
KERNEL(decode_attention) {
  const int64_t slots = shapes[0][0], width = width_of(ndims, shapes, 6), half = width / 2;
  const int64_t heads = shapes[0][1] / width, kv_heads = shapes[1][1] / width, group = heads / kv_heads;
  const int64_t length = shapes[6][0] / (slots * kv_heads);
  const int32_t* positions = INTEGERS(3);
  const float scale = INPUT(8)[0];
  Pool::get().run(slots * kv_heads, [&](int64_t item) {
    const int64_t slot = item / kv_heads, seen = positions[slot] + 1;
    const float *cos = INPUT(4) + slot * width, *sin = INPUT(5) + slot * width;
    float* keys = OUTPUT(6) + item * length * width;
    float* values = OUTPUT(7) + item * length * width;
    const auto turn = [&](const float* from, float factor, float* to) {
      for (int64_t i = 0; i < half; ++i) {
        to[i] = (from[i] * cos[i] - from[half + i] * sin[i]) * factor;
        to[half + i] = (from[half + i] * cos[half + i] + from[i] * sin[half + i]) * factor;
      }
    };
    turn(INPUT(1) + item * width, 1.0f, keys + (seen - 1) * width);
    std::copy_n(INPUT(2) + item * width, width, values + (seen - 1) * width);
    thread_local std::vector<float> query, scores, totals;
    query.resize(width);
    scores.resize(group * seen);
    totals.resize(group);
    for (int64_t i = 0; i < group; ++i) {
      float* of_query = scores.data() + i * seen;
      turn(INPUT(0) + (item * group + i) * width, scale, query.data());
      for (int64_t j = 0; j < seen; ++j) of_query[j] = dot(query.data(), keys + j * width, width);
      totals[i] = exponentials(of_query, seen, maximum(of_query, seen));
    }
    float* out = OUTPUT(9) + item * group * width;
    std::fill_n(out, group * width, 0.0f);
    multiply(group, seen, width, {scores.data(), seen, 1}, values, width, out, width);
    for (int64_t i = 0; i < group * width; ++i) out[i] /= totals[i / width];
  });
  return 0;
}

// --- whole rows ---------------------------------------------------------------------------------------------------

namespace {

constexpr int64_t kQueries = 32;  // queries a block

// One row of the batch under one key-value head.
class Rows {
 public:
  const int64_t length, heads, kv_heads, width, padded, stride;

  Rows(int64_t row, int64_t length, int64_t heads, int64_t kv_heads, int64_t width, const int32_t* positions,
       const int32_t* segments)
      : length(length), heads(heads), kv_heads(kv_heads), width(width), padded((length + kPanel - 1) / kPanel * kPanel),
        stride(padded + kLanes),  // off the powers of two, whose rows share their place in the cache
        positions_(positions + row * length), segments_(segments + row * length) {}

  bool sees(int64_t query, int64_t key) const {
    return (segments_[query] == segments_[key]) & (positions_[key] <= positions_[query]);
  }

  // [T, D] of one head, its rows row_stride apart -> [D, stride], zeros behind T.
  void transpose(const float* from, int64_t row_stride, std::vector<float>& to) const {
    to.assign(width * stride, 0.0f);
    for (int64_t j = 0; j < length; ++j)
      for (int64_t i = 0; i < width; ++i) to[i * stride + j] = from[j * row_stride + i];
  }

  // The keys [first, last) outside of which no query of the block sees any; whole panels.
  std::pair<int64_t, int64_t> seen(int64_t query, int64_t count) const {
    int64_t first = padded, last = 0;
    for (int64_t i = query; i < query + count; ++i) {
      for (int64_t j = 0; j < first; ++j) if (j < length && sees(i, j)) first = j;
      for (int64_t j = length - 1; j >= last; --j) if (sees(i, j)) last = j + 1;
    }
    return {first / kPanel * kPanel, (last + kPanel - 1) / kPanel * kPanel};
  }

  // out [count, last - first] = from [count, D] @ turned [D, first:last]; the rows of out are `stride` apart.
  void against(const float* from, int64_t row_stride, const std::vector<float>& turned, int64_t count, int64_t first,
               int64_t last, float* out) const {
    for (int64_t i = 0; i < count; ++i) std::fill_n(out + i * stride, last - first, 0.0f);
    multiply(count, width, last - first, {from, row_stride, 1}, turned.data() + first, stride, out, stride);
  }

 private:
  const int32_t *positions_, *segments_;
};

}  // namespace

// query [B*T, Hq, D], key and value [B*T, Hkv, D], turned; positions and segments [B, T] int32; scale [] -> output
// [B*T, Hq, D] and the log of each query's total [B, Hq, T].
KERNEL(attention) {
  const int64_t batch = shapes[3][0], length = shapes[3][1], heads = shapes[0][1];
  const int64_t width = shapes[0][2], kv_heads = shapes[1][1], group = heads / kv_heads;
  const float scale = INPUT(5)[0];
  Pool::get().run(batch * kv_heads, [&](int64_t item) {
    const int64_t row = item / kv_heads, kv_head = item % kv_heads;
    const Rows rows(row, length, heads, kv_heads, width, INTEGERS(3), INTEGERS(4));
    const int64_t q_stride = heads * width, kv_stride = kv_heads * width;
    const float* value = INPUT(2) + row * length * kv_stride + kv_head * width;
    thread_local std::vector<float> keys, block;
    rows.transpose(INPUT(1) + row * length * kv_stride + kv_head * width, kv_stride, keys);
    block.resize(kQueries * rows.stride);
    for (int64_t query = 0; query < length; query += kQueries) {
      const int64_t queries = std::min(kQueries, length - query);
      const auto [first, last] = rows.seen(query, queries);
      const int64_t end = std::min(last, length);
      for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
        const int64_t offset = (row * length + query) * q_stride + head * width;
        rows.against(INPUT(0) + offset, q_stride, keys, queries, first, last, block.data());
        float totals[kQueries];
        for (int64_t i = 0; i < queries; ++i) {
          float* scores = block.data() + i * rows.stride - first;
          for (int64_t j = first; j < end; ++j) scores[j] = rows.sees(query + i, j) ? scores[j] * scale : -1e9f;
          const float most = maximum(scores + first, end - first);
          totals[i] = exponentials(scores + first, end - first, most);
          OUTPUT(7)[(row * heads + head) * length + query + i] = most + std::log(totals[i]);
          std::fill_n(OUTPUT(6) + offset + i * q_stride, width, 0.0f);
        }
        multiply(queries, end - first, width, {block.data(), rows.stride, 1}, value + first * kv_stride, kv_stride,
                 OUTPUT(6) + offset, q_stride);
        for (int64_t i = 0; i < queries; ++i)
          for (int64_t d = 0; d < width; ++d) OUTPUT(6)[offset + i * q_stride + d] /= totals[i];
      }
    }
  });
  return 0;
}

// query, key, value, positions, segments, scale, the output and the logs of the totals as above, and g [B*T, Hq, D] ->
// gradients of query, key and value. The weights are computed again: they would be [B, Hq, T, T].
KERNEL(attention_gradient) {
  const int64_t batch = shapes[3][0], length = shapes[3][1], heads = shapes[0][1];
  const int64_t width = shapes[0][2], kv_heads = shapes[1][1], group = heads / kv_heads;
  const float scale = INPUT(5)[0];
  Pool::get().run(batch * kv_heads, [&](int64_t item) {
    const int64_t row = item / kv_heads, kv_head = item % kv_heads;
    const Rows rows(row, length, heads, kv_heads, width, INTEGERS(3), INTEGERS(4));
    const int64_t q_stride = heads * width, kv_stride = kv_heads * width, stride = rows.stride;
    const int64_t kv_offset = row * length * kv_stride + kv_head * width;
    const float* key = INPUT(1) + kv_offset;
    float *dkey = OUTPUT(10) + kv_offset, *dvalue = OUTPUT(11) + kv_offset;
    thread_local std::vector<float> keys, values, weights, dscores;
    rows.transpose(key, kv_stride, keys);
    rows.transpose(INPUT(2) + kv_offset, kv_stride, values);
    weights.resize(kQueries * stride);
    dscores.resize(kQueries * stride);
    for (int64_t j = 0; j < length; ++j) {
      std::fill_n(dkey + j * kv_stride, width, 0.0f);
      std::fill_n(dvalue + j * kv_stride, width, 0.0f);
    }
    for (int64_t query = 0; query < length; query += kQueries) {
      const int64_t queries = std::min(kQueries, length - query);
      const auto [first, last] = rows.seen(query, queries);
      const int64_t end = std::min(last, length), keys_seen = end - first;
      for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
        const int64_t offset = (row * length + query) * q_stride + head * width;
        const float *from = INPUT(0) + offset, *g = INPUT(8) + offset;
        rows.against(from, q_stride, keys, queries, first, last, weights.data());
        rows.against(g, q_stride, values, queries, first, last, dscores.data());
        for (int64_t i = 0; i < queries; ++i) {
          const float log_total = INPUT(7)[(row * heads + head) * length + query + i];
          const float mean = dot(g + i * q_stride, INPUT(6) + offset + i * q_stride, width);
          float *weight = weights.data() + i * stride - first, *dscore = dscores.data() + i * stride - first;
          for (int64_t j = first; j < end; ++j) {
            weight[j] = rows.sees(query + i, j) ? exponential(weight[j] * scale - log_total) : 0.0f;
            dscore[j] = weight[j] * (dscore[j] - mean) * scale;
          }
          std::fill_n(OUTPUT(9) + offset + i * q_stride, width, 0.0f);
        }
        multiply(queries, keys_seen, width, {dscores.data(), stride, 1}, key + first * kv_stride, kv_stride,
                 OUTPUT(9) + offset, q_stride);
        multiply(keys_seen, queries, width, {dscores.data(), 1, stride}, from, q_stride, dkey + first * kv_stride,
                 kv_stride);
        multiply(keys_seen, queries, width, {weights.data(), 1, stride}, g, q_stride, dvalue + first * kv_stride,
                 kv_stride);
      }
    }
  });
  return 0;
}
