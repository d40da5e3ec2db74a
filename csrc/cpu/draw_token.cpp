// From scores to a token on the CPU: guidance, temperature, filters and a seeded draw;
// dalle_fast/reference/draw_token.py is the definition.
//
//   z = (u + cond_scale (c - u) - max) / temperature       c, u: the scores with and without the caption
//   token = argmax over {k : z_k >= floor} of z_k + g_k    score += ln softmax(c)_token
//
// One thread takes a sample: two passes over c for its maximum and its sum of exponentials, one to three to make z, and
// the draw, which makes the noise of 128 codes at a time. Codes that no noise lifts over the best so far get none.
//
// A floor is found by bisection over the bits of z: as z <= 0, the bits without the sign grow as z falls. A turn counts
// the codes up to a pivot, or adds up their probabilities, and moves one end of the range to the nearest code: 12 to 17
// turns for 8192 codes, each over 32 or 64 KB. Top_p is held against sums in float32, in an order that depends on the
// number of codes alone.
//
// All else is float32 too. The bits of a sample's results depend on its row, its seed and the settings, and neither on
// the batch nor on the number of threads; avx2 and avx512 give the same.
#include <cfloat>
#include <cmath>
#include <limits>

#include "decode_parts.h"
#include "gumbel_tiles.h"

namespace dalle_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kItemCodes = 4096;
constexpr int64_t kCodeProducts = 16;  // products of two numbers that take as long as what is done with a code
constexpr float kMostNoise = 16.7f;  // -ln(-ln u) of the largest u is 16.64
constexpr int32_t kMaskedKey = 0x7f800000;  // of z = -inf

// How much of a row lies up to a pivot, the largest key up to it (0 if none) and the smallest past it.
struct Measure {
  double amount;
  int32_t below, above;
};

template <CpuLevel kLevel>
struct DrawLoops {
  using I = Isa<kLevel>;
  using Float = typename I::Float;
  using Int = typename I::Int;
  using Lanes = PhiloxLanes<kLevel>;
  // Vectors in 16 codes: sums over 16 lanes have one order at every level.
  static constexpr int kVectors = I::kVectors;

  // A vector of a row of `count` codes, followed by -inf.
  static DALLE_FAST_INLINE Float load_padded(const float* row, int64_t at, int64_t count) {
    if (at + I::kLanes <= count) return I::load(row + at);
    Float rest = I::splat(kMasked);
    for (int i = 0; at + i < count; ++i) rest[i] = row[at + i];
    return rest;
  }

  static DALLE_FAST_INLINE Int key_of(Float z) { return reinterpret_cast<Int>(z) & 0x7fffffff; }

  static DALLE_FAST_INLINE float largest(Float values) {
    float most = values[0];
    for (int i = 1; i < I::kLanes; ++i) most = values[i] > most ? values[i] : most;
    return most;
  }

  // NaN if one is.
  static DALLE_FAST_INLINE float maximum(const float* row, int64_t count) {
    Float most[2] = {I::splat(kMasked), I::splat(kMasked)};
    Int is_nan[2] = {};
    for (int64_t first = 0; first < count; first += 2 * I::kLanes) {
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const Float value = load_padded(row, first + i * I::kLanes, count);
        most[i] = I::max(value, most[i]);
        is_nan[i] |= value != value;
      }
    }
    const Int any_nan = is_nan[0] | is_nan[1];
    for (int i = 0; i < I::kLanes; ++i) {
      if (any_nan[i] != 0) return std::numeric_limits<float>::quiet_NaN();
    }
    return largest(I::max(most[0], most[1]));
  }

  static DALLE_FAST_INLINE float total(const Float (&sums)[kVectors]) {
    float all = 0.0f;
    for (int v = 0; v < kVectors; ++v) {
      for (int i = 0; i < I::kLanes; ++i) all += sums[v][i];
    }
    return all;
  }

  // Adds up what value(code of the vector's first lane) gives for all codes: 128 by themselves first.
  template <class Value>
  static DALLE_FAST_INLINE float sum(int64_t count, Value value) {
    Float sums[kVectors] = {};
    for (int64_t first = 0; first < count; first += kBlockCodes) {
      Float block[kVectors] = {};
      for (int64_t at = first; at < first + kBlockCodes; at += kTileQueries) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) block[v] += value(at + v * I::kLanes);
      }
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[v] += block[v];
    }
    return total(sums);
  }

  // ln softmax(row)_token
  static DALLE_FAST_INLINE float log_likelihood(const float* row, int64_t count, float most, int64_t token) {
    const float all = sum(count, [&](int64_t at) __attribute__((always_inline)) {
      return I::exp(load_padded(row, at, count) - most);
    });
    return (row[token] - most) - std::log(all);
  }

  // How many of the `count` keys of z are up to a pivot, or with kMass the sum of their masses, in one order for all
  // pivots: so a sum never falls as the pivot rises. And the keys next to the pivot.
  template <bool kMass>
  static DALLE_FAST_INLINE Measure measure(int32_t pivot, const float* z, const float* mass, int64_t count) {
    constexpr int kChains = 2;  // of dependent instructions, side by side
    Int below = {}, above = Int{} + kMaskedKey, counts = {};
    Float masses[kVectors] = {};
    for (int64_t first = 0; first < count; first += kBlockCodes) {
      Float block[kChains][kVectors] = {};
      for (int64_t at = first; at < first + kBlockCodes; at += kChains * kTileQueries) {
#pragma GCC unroll 2
        for (int c = 0; c < kChains; ++c) {
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) {
            const int64_t code = at + c * kTileQueries + v * I::kLanes;
            const Int key = key_of(I::load(z + code));
            // Each compares for itself: a mask that is kept as a vector costs more.
            const Int or_least = key <= pivot ? key : Int{}, or_most = key <= pivot ? Int{} + kMaskedKey : key;
            below = or_least > below ? or_least : below;
            above = or_most < above ? or_most : above;
            if constexpr (kMass) {
              block[c][v] += key <= pivot ? I::load(mass + code) : Float{};
            } else {
              counts += key <= pivot ? Int{} + 1 : Int{};
            }
          }
        }
      }
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) masses[v] += block[0][v] + block[1][v];
    }
    Measure result{kMass ? total(masses) : 0.0, below[0], above[0]};
    for (int i = 0; i < I::kLanes; ++i) {
      if constexpr (!kMass) result.amount += counts[i];
      result.below = std::max(result.below, static_cast<int32_t>(below[i]));
      result.above = std::min(result.above, static_cast<int32_t>(above[i]));
    }
    return result;
  }

  // The smallest key up to which there is as much as is needed; 0 is a key, and up to `high` there is enough.
  template <bool kMass>
  static DALLE_FAST_INLINE int32_t floor_key(const float* z, const float* mass, int64_t count, double needed,
                                             int32_t high) {
    int32_t low = 0;
    while (low < high) {
      const Measure measured = measure<kMass>(low + (high - low) / 2, z, mass, count);
      if (measured.amount >= needed) {
        high = measured.below;
      } else {
        low = measured.above;
      }
    }
    return high;
  }

  // The first of the codes with the highest z + noise among those with a key <= floor.
  static DALLE_FAST_INLINE int64_t draw(const float* z, int64_t count, int32_t floor, uint64_t seed, uint64_t row) {
    const PhiloxKeys keys(seed);
    alignas(64) float kept[kBlockCodes], noise[kBlockCodes];
    Float best = I::splat(kMasked);
    Int best_code = {};
    for (int64_t first = 0; first < count; first += kBlockCodes) {
      Float highest = I::splat(kMasked);
      for (int64_t c = 0; c < kBlockCodes; c += I::kLanes) {
        const Float value = I::load(z + first + c);
        const Float or_masked = key_of(value) <= floor ? value : I::splat(kMasked);
        highest = I::max(or_masked, highest);
        I::store(kept + c, or_masked);
      }
      const float reach = largest(highest) + kMostNoise;
      if (reach == kMasked || reach < largest(best)) continue;
      // Two loops, words and then their logarithms, as in add_noise.
      const auto counters = static_cast<uint32_t>(first / kBlockCodes * kBlockCounters);
      for (int half = 0; half < kBlockCounters; half += kTileQueries) {
        Int words[4][kVectors];
        Lanes::words_of_row(row, counters + static_cast<uint32_t>(half), keys, words);
#pragma GCC unroll 4
        for (int w = 0; w < 4; ++w) {
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) {
            I::store(noise + w * kBlockCounters + half + v * I::kLanes, reinterpret_cast<Float>(words[w][v]));
          }
        }
      }
      constexpr int kAtOnce = I::kLanes == 16 ? 8 : 2;  // as registers allow
      for (int64_t c = 0; c < kBlockCodes; c += kAtOnce * I::kLanes) {
        Float value[kAtOnce];
#pragma GCC unroll 8
        for (int i = 0; i < kAtOnce; ++i) value[i] = I::load(noise + c + i * I::kLanes);
        Lanes::template gumbel<kAtOnce>(value);
#pragma GCC unroll 8
        for (int i = 0; i < kAtOnce; ++i) {
          value[i] += I::load(kept + c + i * I::kLanes);
          const Int is_more = value[i] > best;
          best_code = is_more ? Int{} + static_cast<int32_t>(first + c + i * I::kLanes) : best_code;
          best = is_more ? value[i] : best;
        }
      }
    }
    float most = kMasked;
    int64_t token = 0;
    for (int i = 0; i < I::kLanes; ++i) {
      const int64_t code = best_code[i] + i;
      if (best[i] > most || (best[i] == most && code < token)) {
        most = best[i];
        token = code;
      }
    }
    return token;
  }

  // z, and where top_p asks for it `mass`, have room for whole blocks of codes.
  static DALLE_FAST_INLINE int64_t choose(const DrawPart& args, int64_t sample, float most, float* z, float* mass) {
    const int64_t codes = args.codes;
    const float* guided = args.conditional + sample * codes;
    if (args.unconditional != nullptr) {
      const float *c = guided, *u = args.unconditional + sample * codes;
      for (int64_t at = 0; at < codes; at += I::kLanes) {
        const Float without = load_padded(u, at, codes);
        I::store(z + at, without + args.cond_scale * (load_padded(c, at, codes) - without));
      }
      guided = z;
      most = maximum(z, codes);
    }
    if (std::isnan(most)) return 0;
    // Where +inf is, it is taken; where nothing else than -inf is, the first.
    if (args.takes_likeliest || std::isinf(most)) return std::find(guided, guided + codes, most) - guided;

    const int64_t padded = ceil_div(codes, kBlockCodes) * kBlockCodes;
    for (int64_t at = 0; at < padded; at += I::kLanes) {
      I::store(z + at, (load_padded(guided, at, codes) - most) / args.temperature);
    }
    int32_t floor = kMaskedKey;
    if (args.top_k < codes) floor = floor_key<false>(z, nullptr, padded, static_cast<double>(args.top_k), floor);
    if (args.top_p < 1.0) {
      for (int64_t at = 0; at < padded; at += I::kLanes) {
        const Float value = I::load(z + at), power = I::exp(value);
        I::store(mass + at, key_of(value) <= floor ? power : Float{});
      }
      const double all = measure<true>(floor, z, mass, padded).amount;
      floor = floor_key<true>(z, mass, padded, args.top_p * all, floor);
    }
    return draw(z, padded, floor, static_cast<uint64_t>(args.seeds[sample]), static_cast<uint64_t>(*args.position));
  }
};

struct DrawWorker {
  template <CpuLevel kLevel>
  __attribute__((always_inline)) static inline void run(const DrawPart* args, float* scratch, int64_t begin,
                                                        int64_t end) {
    using Loops = DrawLoops<kLevel>;
    for (int64_t sample = begin; sample < end; ++sample) {
      const float* row = args->conditional + sample * args->codes;
      const float most = Loops::maximum(row, args->codes);
      int64_t& token = args->tokens[args->place(sample)];
      if (!args->keeps(sample)) {
        token = Loops::choose(*args, sample, most, scratch, scratch + ceil_div(args->codes, kBlockCodes) * kBlockCodes);
      }
      args->scores[sample] += Loops::log_likelihood(row, args->codes, most, token);
    }
  }
};

Part part_of(const Tensor& logits, const Tensor& seeds, const Tensor& position, const std::optional<Tensor>& keep,
             double temperature, int64_t top_k, double top_p, const std::optional<double>& cond_scale, Tensor& tokens,
             Tensor& scores) {
  if (logits.dim() != 2 || logits.size(1) < 1) {
    throw std::runtime_error("logits must have two dimensions and at least one code, got shape " +
                             tuple_text(logits.sizes()));
  }
  if (tokens.dim() != 2) {
    throw std::runtime_error("tokens must have two dimensions, got shape " + tuple_text(tokens.sizes()));
  }
  const int64_t samples = tokens.size(0), codes = logits.size(1), length = tokens.size(1);
  check_shape(logits, "logits", {cond_scale.has_value() ? 2 * samples : samples, codes});
  if (keep.has_value()) check_shape(*keep, "keep", {samples, length});
  DrawPart part{};
  part.conditional = data_of<const float>(logits, "logits", ScalarType::Float, logits.numel());
  if (cond_scale.has_value()) {
    part.unconditional = part.conditional + samples * codes;
    part.cond_scale = static_cast<float>(*cond_scale);
  }
  part.samples = samples;
  part.codes = codes;
  part.seeds = data_of<const int64_t>(seeds, "seeds", ScalarType::Long, samples);
  part.position = data_of<const int64_t>(position, "position", ScalarType::Long, 1);
  if (keep.has_value()) part.keep = data_of<const bool>(*keep, "keep", ScalarType::Bool, samples * length);
  part.takes_likeliest = temperature < FLT_MIN;
  part.temperature = static_cast<float>(std::min<double>(temperature, FLT_MAX));  // -inf divided by inf would be NaN
  part.top_k = top_k;
  part.top_p = top_p;
  part.tokens = data_of<int64_t>(tokens, "tokens", ScalarType::Long, samples * length);
  part.length = length;
  part.scores = data_of<float>(scores, "scores", ScalarType::Float, samples);
  return part;
}

void draw_token(const Tensor logits, const Tensor seeds, const Tensor position, const std::optional<Tensor> keep,
                double temperature, int64_t top_k, double top_p, const std::optional<double> cond_scale, Tensor tokens,
                Tensor scores) {
  const Part part = part_of(logits, seeds, position, keep, temperature, top_k, top_p, cond_scale, tokens, scores);
  run_parts({&part, 1});
}

Tensor draw_token_plan(const Tensor logits, const Tensor seeds, const Tensor position,
                       const std::optional<Tensor> keep, double temperature, int64_t top_k, double top_p,
                       const std::optional<double> cond_scale, Tensor tokens, Tensor scores) {
  const Part part = part_of(logits, seeds, position, keep, temperature, top_k, top_p, cond_scale, tokens, scores);
  return plan_of({&part, 1}, logits);
}

}  // namespace

int64_t DrawPart::begin(std::vector<int32_t>&) const {
  if (*position < 0 || *position >= length) {
    throw std::runtime_error("position must be in 0.." + std::to_string(length - 1) + ", got " +
                             std::to_string(*position));
  }
  for (int64_t sample = 0; sample < samples; ++sample) {
    const int64_t token = tokens[place(sample)];
    if (!keeps(sample) || (token >= 0 && token < codes)) continue;
    throw std::runtime_error("tokens that are kept must be in 0.." + std::to_string(codes - 1) + ", got " +
                             std::to_string(token));
  }
  return kCodeProducts * samples * codes;
}

Division DrawPart::divide(int64_t) {
  samples_an_item = std::max<int64_t>(1, kItemCodes / codes);
  return {ceil_div(samples, samples_an_item), 0, 2 * ceil_div(codes, kBlockCodes) * kBlockCodes};
}

void DrawPart::run(int64_t item, PartMemory memory) const {
  const int64_t first = item * samples_an_item, end = std::min(first + samples_an_item, samples);
  run_at_cpu_level<DrawWorker>(this, memory.own, first, end);
}

STABLE_TORCH_LIBRARY_IMPL(dalle_fast, CPU, m) {
  m.impl("draw_token_cpu", TORCH_BOX(&draw_token));
  m.impl("draw_token_plan_cpu", TORCH_BOX(&draw_token_plan));
}

}  // namespace dalle_fast
