/* Runs the network of model.h on one sample, in integers: C99, no floats, no allocation, no libraries.
 *
 *     int8_t *input = model_input();         fill it: round(x / MODEL_INPUT_SCALE) + MODEL_INPUT_ZERO, clamped
 *     model_run();
 *     const void *output = model_output();   MODEL_OUTPUT_TYPE values; (y - MODEL_OUTPUT_ZERO) * MODEL_OUTPUT_SCALE
 *
 * Written to be read; where speed counts, give the arrays of model.h to CMSIS-NN (compiled with
 * CMSIS_NN_USE_SINGLE_ROUNDING), whose conventions for multipliers and shifts they follow. Weights are stored output
 * channels first, [out, in / groups, height, width].
 */
#include "model.h"

static int32_t arena[(MODEL_ARENA + 3) / 4];

static void *tensor(int32_t i) { return (int8_t *)arena + MODEL_TENSORS[3 * i]; }
int8_t *model_input(void) { return (int8_t *)tensor(MODEL_INPUT); }
const void *model_output(void) { return tensor(MODEL_OUTPUT); }

/* round(x * multiplier * 2^(shift - 31)), halves up: arm_nn_requantize, single rounding */
static int64_t scaled(int64_t x, int32_t multiplier, int32_t shift) {
  const int32_t right = 31 - shift;
  return (x * multiplier + ((int64_t)1 << (right - 1))) >> right;
}

static void put(int32_t i, int32_t place, int64_t value) {
  if (MODEL_TENSORS[3 * i + 2] == 1) ((int8_t *)tensor(i))[place] = (int8_t)value;
  else ((int32_t *)tensor(i))[place] = (int32_t)value;
}

static int32_t values(int32_t i) { return MODEL_TENSORS[3 * i + 1]; }

static int32_t get(int32_t i, int32_t place) {
  return MODEL_TENSORS[3 * i + 2] == 1 ? ((const int8_t *)tensor(i))[place] : ((const int32_t *)tensor(i))[place];
}

/* A sum to the grid { zero, low, high } of tensor i */
static void emit(int32_t i, int32_t place, int64_t sum, const model_step *step, int32_t channel, const int32_t *grid) {
  int64_t y = scaled(sum, step->multiplier[channel], step->shift[channel]) + grid[0];
  put(i, place, y < grid[1] ? grid[1] : y > grid[2] ? grid[2] : y);
}

/* The place in a tensor of value number n of a view: dims and strides, the last dimension fastest */
static int32_t place_of(int32_t n, int32_t rank, const int32_t *dims, const int32_t *strides) {
  int32_t place = 0;
  for (int32_t d = rank - 1; d >= 0; --d) {
    place += n % dims[d] * strides[d];
    n /= dims[d];
  }
  return place;
}

static int32_t product_of(int32_t rank, const int32_t *dims) {
  int32_t n = 1;
  for (int32_t d = 0; d < rank; ++d) n *= dims[d];
  return n;
}

static void conv(const model_step *s, const int32_t *p) {
  const int32_t in = p[0], out = p[1], zero = p[2], h = p[7], w = p[8], outs = p[9], rows = p[10], columns = p[11];
  const int32_t kh = p[12], kw = p[13], ins = p[6] / p[20], per_group = outs / p[20];
  for (int32_t o = 0; o < outs; ++o)
    for (int32_t r = 0; r < rows; ++r)
      for (int32_t c = 0; c < columns; ++c) {
        int64_t sum = s->bias[o];
        for (int32_t i = 0; i < ins; ++i)
          for (int32_t y = 0; y < kh; ++y)
            for (int32_t x = 0; x < kw; ++x) {
              const int32_t row = r * p[14] - p[16] + y * p[18], column = c * p[15] - p[17] + x * p[19];
              if (row < 0 || row >= h || column < 0 || column >= w) continue; /* padding stands for 0 */
              const int32_t channel = o / per_group * ins + i;
              sum += (get(in, (channel * h + row) * w + column) - zero) * s->weight[((o * ins + i) * kh + y) * kw + x];
            }
        emit(out, (o * rows + r) * columns + c, sum, s, o, p + 3);
      }
}

static void linear(const model_step *s, const int32_t *p) {
  const int32_t ins = p[7], outs = p[8];
  for (int32_t n = 0; n < p[6]; ++n)
    for (int32_t o = 0; o < outs; ++o) {
      int64_t sum = s->bias[o];
      for (int32_t i = 0; i < ins; ++i) sum += (get(p[0], n * ins + i) - p[2]) * s->weight[o * ins + i];
      emit(p[1], n * outs + o, sum, s, o, p + 3);
    }
}

static void add(const model_step *s, const int32_t *p) {
  const int32_t rank = p[5], count = p[6], size = product_of(rank, p + 7);
  for (int32_t n = 0; n < size; ++n) {
    int64_t sum = 0;
    for (int32_t i = 0; i < count; ++i) {
      const int32_t *q = p + 7 + rank + i * (5 + rank); /* tensor, zero, sign, multiplier, shift, strides */
      const int64_t x = (int64_t)(get(q[0], place_of(n, rank, p + 7, q + 5)) - q[1]) * ((int64_t)1 << p[4]);
      sum += q[2] * scaled(x, q[3], q[4]);
    }
    emit(p[0], n, sum, s, 0, p + 1);
  }
}

static void multiply(const model_step *s, const int32_t *p) {
  const int32_t rank = p[4], *dims = p + 5, *a = dims + rank, *b = a + 2 + rank, size = product_of(rank, dims);
  for (int32_t n = 0; n < size; ++n) {
    const int64_t x = get(a[0], place_of(n, rank, dims, a + 2)) - a[1];
    emit(p[0], n, x * (get(b[0], place_of(n, rank, dims, b + 2)) - b[1]), s, 0, p + 1);
  }
}

static void mean(const model_step *s, const int32_t *p) {
  const int32_t kept = p[6], summed = p[7], *dims = p + 8, *strides = dims + kept;
  const int32_t *over = strides + kept, *steps = over + summed;
  const int32_t size = product_of(kept, dims), count = product_of(summed, over);
  for (int32_t n = 0; n < size; ++n) {
    const int32_t start = place_of(n, kept, dims, strides);
    int64_t sum = 0;
    for (int32_t i = 0; i < count; ++i) sum += get(p[0], start + place_of(i, summed, over, steps)) - p[2];
    emit(p[1], n, sum, s, 0, p + 3);
  }
}

static void average(const model_step *s, const int32_t *p) {
  const int32_t h = p[7], w = p[8], rows = p[9], columns = p[10], above = p[17] ? p[15] : 0, left = p[17] ? p[16] : 0;
  for (int32_t c = 0; c < p[6]; ++c)
    for (int32_t r = 0; r < rows; ++r)
      for (int32_t o = 0; o < columns; ++o) {
        int64_t sum = 0;
        int32_t count = 0;
        for (int32_t y = 0; y < p[11]; ++y)
          for (int32_t x = 0; x < p[12]; ++x) {
            const int32_t row = r * p[13] - p[15] + y, column = o * p[14] - p[16] + x;
            count += row >= -above && row < h + above && column >= -left && column < w + left;
            if (row < 0 || row >= h || column < 0 || column >= w) continue;
            sum += get(p[0], (c * h + row) * w + column) - p[2];
          }
        emit(p[1], (c * rows + r) * columns + o, p[18] ? sum * (p[18] / count) : sum, s, 0, p + 3);
      }
}

static void largest(const int32_t *p) {
  const int32_t h = p[3], w = p[4], rows = p[5], columns = p[6];
  for (int32_t c = 0; c < p[2]; ++c)
    for (int32_t r = 0; r < rows; ++r)
      for (int32_t o = 0; o < columns; ++o) {
        int32_t most = -128;
        for (int32_t y = 0; y < p[7]; ++y)
          for (int32_t x = 0; x < p[8]; ++x) {
            const int32_t row = r * p[9] - p[11] + y * p[13], column = o * p[10] - p[12] + x * p[14];
            if (row < 0 || row >= h || column < 0 || column >= w) continue;
            const int32_t value = get(p[0], (c * h + row) * w + column);
            if (value > most) most = value;
          }
        put(p[1], (c * rows + r) * columns + o, most);
      }
}

static void copy(const int32_t *p) {
  const int32_t rank = p[4], *dims = p + 7, size = product_of(rank, dims);
  if (p[2])
    for (int32_t n = 0; n < values(p[1]); ++n) put(p[1], n, p[3]);
  for (int32_t n = 0; n < size; ++n)
    put(p[1], p[6] + place_of(n, rank, dims, dims + 2 * rank), get(p[0], p[5] + place_of(n, rank, dims, dims + rank)));
}

void model_run(void) {
  for (int32_t i = 0; i < (int32_t)(sizeof MODEL_STEPS / sizeof *MODEL_STEPS); ++i) {
    const model_step *s = MODEL_STEPS + i;
    const int32_t *p = s->parameters;
    switch (s->operation) {
      case MODEL_CONV: conv(s, p); break;
      case MODEL_LINEAR: linear(s, p); break;
      case MODEL_ADD: add(s, p); break;
      case MODEL_MULTIPLY: multiply(s, p); break;
      case MODEL_MEAN: mean(s, p); break;
      case MODEL_AVERAGE: average(s, p); break;
      case MODEL_MAX: largest(p); break;
      case MODEL_COPY: copy(p); break;
      case MODEL_CLAMP:
        for (int32_t n = 0; n < values(p[1]); ++n) put(p[1], n, get(p[0], n) < p[2] ? p[2] : get(p[0], n));
        break;
      case MODEL_TABLE:
        for (int32_t n = 0; n < values(p[1]); ++n) {
          const int32_t at = get(p[0], n) - p[2];
          put(p[1], n, s->weight ? s->weight[at] : s->bias[at]);
        }
        break;
      case MODEL_CONSTANT:
        for (int32_t n = 0; n < values(p[0]); ++n) put(p[0], n, s->weight[n]);
        break;
    }
  }
}
