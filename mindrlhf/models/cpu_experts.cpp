// A layer's experts, each over its own tokens only, and their gradients.

#include "cpu_kernels.h"

using namespace mindrlhf;

namespace {

constexpr int64_t kColumns = 128;  // of a product, a chunk
constexpr int64_t kStreamed = 16;  // up to so many rows of x, copying the weight costs more than it saves

// Inputs: x [M, H], best [M, k] int32, shares [M, k], gate and up [n, I, H], down [n, H, I], and int32 [2]: the number
// of the first expert here, and whether the last two axes of the weights are swapped.
struct Sizes {
  int64_t tokens, width, choices, experts, inner, pairs, first;
  bool transposed;

  Sizes(void** params, int64_t** shapes)
      : tokens(shapes[0][0]), width(shapes[0][1]), choices(shapes[1][1]), experts(shapes[3][0]),
        inner(shapes[3][1] * shapes[3][2] / width), pairs(tokens * choices), first(INTEGERS(6)[0]),
        transposed(INTEGERS(6)[1]) {}

  // The matrices that inputs of one expert are multiplied by, of the weights of all.
  Matrix gate(const float* weights, int64_t expert) const { return weight(weights, expert, width, inner); }
  Matrix down(const float* weights, int64_t expert) const { return weight(weights, expert, inner, width); }

 private:
  Matrix weight(const float* weights, int64_t expert, int64_t from, int64_t to) const {
    const float* data = weights + expert * from * to;
    return transposed ? Matrix{data, to, 1} : Matrix{data, 1, from};
  }
};

// The pairs (token, choice) of the experts that are here, by expert and then by token.
struct Sorted {
  std::vector<int64_t> starts;  // of each expert, and behind the last
  std::vector<int64_t> pairs;   // token * k + choice
  std::vector<int64_t> places;  // of every pair among them, -1 for that of another rank's expert

  Sorted(const int32_t* best, const Sizes& sizes) : starts(sizes.experts + 1), places(sizes.pairs, -1) {
    const auto expert_of = [&](int64_t pair) {
      const int64_t expert = best[pair] - sizes.first;
      return expert >= 0 && expert < sizes.experts ? expert : -1;
    };
    for (int64_t pair = 0; pair < sizes.pairs; ++pair)
      if (expert_of(pair) >= 0) ++starts[expert_of(pair) + 1];
    for (int64_t expert = 0; expert < sizes.experts; ++expert) starts[expert + 1] += starts[expert];
    pairs.resize(starts.back());
    std::vector<int64_t> next(starts);
    for (int64_t pair = 0; pair < sizes.pairs; ++pair) {
      if (expert_of(pair) < 0) continue;
      places[pair] = next[expert_of(pair)]++;
      pairs[places[pair]] = pair;
    }
  }

  int64_t count() const { return pairs.size(); }
};

// Rows of floats, `stride` apart.
struct Rows {
  float* data;
  int64_t width, stride;

  float* operator[](int64_t row) const { return data + row * stride; }
  Matrix from(int64_t row, int64_t column = 0) const { return {(*this)[row] + column, stride, 1}; }
};

// Rows of `width` at the beginning of a piece of memory, which then begins behind them. Their distance is off the
// powers of two, whose rows share their place in the cache. The memory is an output that nobody reads: memory of our
// own would be new at each call, and clearing its pages took a fifth of the time.
Rows take(float*& memory, const Sorted& sorted, int64_t width) {
  const Rows rows = {memory, width, width + kLanes};
  memory += sorted.count() * rows.stride;
  return rows;
}

Matrix turned(Matrix matrix) { return {matrix.data, matrix.column, matrix.row}; }

// A sorted pair's row is its token's of x [M, H].
void gather(const float* x, const Sorted& sorted, const Sizes& sizes, const Rows& rows) {
  for_chunks(sorted.count(), rows_per_chunk(sizes.width), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
      std::copy_n(x + sorted.pairs[i] / sizes.choices * sizes.width, sizes.width, rows[i]);
  });
}

// out [M, H]: the sum over a token's pairs here, in the order of its choices, each times its share unless that is null.
void scatter(const Rows& rows, const float* shares, const Sorted& sorted, const Sizes& sizes, float* out) {
  for_chunks(sizes.tokens, rows_per_chunk(sizes.choices * sizes.width), [&](int64_t first, int64_t last) {
    std::fill(out + first * sizes.width, out + last * sizes.width, 0.0f);
    for (int64_t pair = first * sizes.choices; pair < last * sizes.choices; ++pair) {
      if (sorted.places[pair] < 0) continue;
      const float *row = rows[sorted.places[pair]], share = shares ? shares[pair] : 1.0f;
      float* sum = out + pair / sizes.choices * sizes.width;
      for (int64_t i = 0; i < sizes.width; ++i) sum[i] += share * row[i];
    }
  });
}

// out [rows, width] += x [rows, inner] @ weight [inner, width]; either matrix may lie any way.
void product(int64_t rows, int64_t inner, int64_t width, Matrix x, Matrix weight, float* out, int64_t stride) {
  if (weight.column == 1 && rows <= kStreamed) {
    multiply(rows, inner, width, x, weight.data, weight.row, out, stride);
    return;
  }
  alignas(64) float panel[kDepth * kPanel];
  for (int64_t k = 0; k < inner; k += kDepth) {
    const int64_t depth = std::min<int64_t>(kDepth, inner - k);
    for (int64_t column = 0; column < width; column += kPanel) {
      const int64_t columns = std::min<int64_t>(kPanel, width - column);
      const float* block = weight.data + k * weight.row + column * weight.column;
      if (weight.column == 1) {
        for (int64_t i = 0; i < depth; ++i) std::copy_n(block + i * weight.row, columns, panel + i * kPanel);
      } else {
        for (int64_t c = 0; c < columns; ++c)
          for (int64_t i = 0; i < depth; ++i) panel[i * kPanel + c] = block[i * weight.row + c * weight.column];
      }
      multiply(rows, depth, columns, {x.data + k * x.column, x.row, x.column}, panel, kPanel, out + column, stride);
    }
  }
}

// Some columns of an expert's rows.
struct Piece {
  int64_t expert, row, rows, column, columns;

  // to = from @ weight [from.width, to.width], or added to it.
  void multiply(const Rows& from, Matrix weight, const Rows& to, bool adds = false) const {
    if (!adds) for (int64_t r = row; r < row + rows; ++r) std::fill_n(to[r] + column, columns, 0.0f);
    weight.data += column * weight.column;
    product(rows, from.width, columns, from.from(row), weight, to[row] + column, to.stride);
  }
};

// body(piece) over all the experts' rows of that width.
template <class Body>
void for_pieces(const Sorted& sorted, int64_t width, const Body& body) {
  const int64_t pieces = (width + kColumns - 1) / kColumns;
  Pool::get().run((sorted.starts.size() - 1) * pieces, [&](int64_t chunk) {
    const int64_t expert = chunk / pieces, column = chunk % pieces * kColumns, row = sorted.starts[expert];
    body(Piece{expert, row, sorted.starts[expert + 1] - row, column, std::min(kColumns, width - column)});
  });
}

// Of every expert's weight, as it lies, from its inputs and the gradients of its outputs; 0 where it had none.
void weight_gradients(const Rows& inputs, const Rows& gradients, const Sorted& sorted, bool transposed, float* out) {
  const Rows &left = transposed ? inputs : gradients, &right = transposed ? gradients : inputs;
  for_pieces(sorted, right.width, [&](const Piece& piece) {
    const Rows its = {out + piece.expert * left.width * right.width, right.width, right.width};
    for (int64_t r = 0; r < left.width; ++r) std::fill_n(its[r] + piece.column, piece.columns, 0.0f);
    product(left.width, piece.rows, piece.columns, turned(left.from(piece.row)), right.from(piece.row, piece.column),
            its[0] + piece.column, its.stride);
  });
}

}  // namespace

// -> of every token the sum over its experts here of share * down (silu(gate x) * up x) [M, H]; and for the gradient
// gate x and up x [M * k, I] of the sorted pairs, nothing behind the last; and memory [M * k, H + I + 2 * kLanes].
KERNEL(expert_mlp) {
  const Sizes sizes(params, shapes);
  const Sorted sorted(INTEGERS(1), sizes);
  float* memory = OUTPUT(10);
  const Rows x = take(memory, sorted, sizes.width), hidden = take(memory, sorted, sizes.inner);
  const Rows gates = {OUTPUT(8), sizes.inner, sizes.inner}, ups = {OUTPUT(9), sizes.inner, sizes.inner};
  gather(INPUT(0), sorted, sizes, x);
  for_pieces(sorted, sizes.inner, [&](const Piece& piece) {
    piece.multiply(x, sizes.gate(INPUT(3), piece.expert), gates);
    piece.multiply(x, sizes.gate(INPUT(4), piece.expert), ups);
    for (int64_t r = piece.row; r < piece.row + piece.rows; ++r) {
      const float *gate = gates[r], *up = ups[r];
      float* to = hidden[r];
      for (int64_t i = piece.column; i < piece.column + piece.columns; ++i) to[i] = gate[i] * sigmoid(gate[i]) * up[i];
    }
  });
  for_pieces(sorted, sizes.width, [&](const Piece& piece) {
    piece.multiply(hidden, sizes.down(INPUT(5), piece.expert), x);  // which has been read
  });
  scatter(x, INPUT(2), sorted, sizes, OUTPUT(7));
  return 0;
}

// The inputs and the two arrays for the gradient as above, and g [M, H] -> gradients of x, shares, gate, up and down;
// and memory [M * k, 2 H + 3 I + 5 * kLanes].
KERNEL(expert_mlp_gradient) {
  const Sizes sizes(params, shapes);
  const Sorted sorted(INTEGERS(1), sizes);
  const float *gates = INPUT(7), *ups = INPUT(8);
  float *memory = OUTPUT(15), *dshares = OUTPUT(11);
  const Rows x = take(memory, sorted, sizes.width), g = take(memory, sorted, sizes.width);
  const Rows dgates = take(memory, sorted, sizes.inner), dups = take(memory, sorted, sizes.inner);
  const Rows weighted = take(memory, sorted, sizes.inner);
  gather(INPUT(0), sorted, sizes, x);
  gather(INPUT(9), sorted, sizes, g);
  for_pieces(sorted, sizes.inner, [&](const Piece& piece) {  // of what the SwiGLU gives, in the place of dups
    piece.multiply(g, turned(sizes.down(INPUT(5), piece.expert)), dups);
  });
  std::fill_n(dshares, sizes.pairs, 0.0f);
  for_chunks(sorted.count(), rows_per_chunk(sizes.inner), [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      const float *gate = gates + r * sizes.inner, *up = ups + r * sizes.inner, share = INPUT(2)[sorted.pairs[r]];
      float *dgate = dgates[r], *dup = dups[r], *hidden = weighted[r], along = 0;
#pragma omp simd reduction(+ : along)
      for (int64_t i = 0; i < sizes.inner; ++i) {
        const float open = sigmoid(gate[i]), silu = gate[i] * open, gradient = dup[i] * share;
        along += silu * up[i] * dup[i];
        hidden[i] = silu * up[i] * share;
        dgate[i] = gradient * up[i] * (open + silu * (1.0f - open));
        dup[i] = gradient * silu;
      }
      dshares[sorted.pairs[r]] = along;
    }
  });
  weight_gradients(x, dgates, sorted, sizes.transposed, OUTPUT(12));
  weight_gradients(x, dups, sorted, sizes.transposed, OUTPUT(13));
  weight_gradients(weighted, g, sorted, sizes.transposed, OUTPUT(14));
  for_pieces(sorted, sizes.width, [&](const Piece& piece) {
    piece.multiply(dgates, turned(sizes.gate(INPUT(3), piece.expert)), x);  // which has been read
    piece.multiply(dups, turned(sizes.gate(INPUT(4), piece.expert)), x, true);
  });
  scatter(x, nullptr, sorted, sizes, OUTPUT(10));
  return 0;
}
