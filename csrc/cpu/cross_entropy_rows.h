// One row of logits at a time: cross_entropy.cpp includes this file once for each instruction set,
// in a namespace of its own, with REGISTER, the bytes of one of its vector registers.
// No include guard, and no include: both belong to cross_entropy.cpp.

typedef float Floats __attribute__((vector_size(REGISTER)));
typedef int32_t Ints __attribute__((vector_size(REGISTER)));
typedef uint32_t Words __attribute__((vector_size(REGISTER)));
typedef uint16_t Halves __attribute__((vector_size(REGISTER / 2)));
typedef double Doubles __attribute__((vector_size(REGISTER)));

// exp(x) for x <= 88, within 2 units in the last place; 0 below -87, NaN for NaN. Cody and Waite's
// reduction to |r| <= log(2) / 2, then a polynomial fitted at Chebyshev nodes (error 1e-8).
inline Floats exponential(Floats x) {
  const Floats rounder = Floats{} + 0x1.8p23f;  // its sum with a float ends in the nearest integer
  const Floats shifted = x * 1.44269504f + rounder;
  const Floats n = shifted - rounder;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats q = 1.393373322e-3f * r + 8.363235385e-3f;
  q = q * r + 4.166646417e-2f;
  q = q * r + 1.666657664e-1f;
  q = q * r + 5.000000014e-1f;
  const Floats p = q * (r * r) + r + 1.0f;
  const Ints power = (Ints)shifted - (Ints)rounder;
  const Floats result = p * (Floats)((power + 127) << 23);
  return x < -87.0f ? Floats{} : result;
}

inline Doubles exponential(Doubles x) {
  for (size_t lane = 0; lane < REGISTER / sizeof(double); ++lane) x[lane] = std::exp(x[lane]);
  return x;
}

// How the elements of a row are read and written; all arithmetic is in `Vector`.
template <typename Number, typename Numbers>
struct Plain {
  using Element = Number;
  using Value = Number;
  using Vector = Numbers;

  static Vector load(const Element* from) {
    Vector values;
    std::memcpy(&values, from, sizeof values);
    return values;
  }
  static void store(Element* to, Vector values) { std::memcpy(to, &values, sizeof values); }
};

using Float = Plain<float, Floats>;
using Double = Plain<double, Doubles>;

struct BFloat {
  using Element = uint16_t;
  using Value = float;
  using Vector = Floats;

  static Vector load(const Element* from) {
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    return (Floats)(__builtin_convertvector(halves, Words) << 16);
  }
  static void store(Element* to, Vector values) {  // to the nearest, ties to even
    const Words bits = (Words)values;
    const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Words kept = values == values ? rounded : (bits >> 16) | 0x40;
    const Halves halves = __builtin_convertvector(kept, Halves);
    std::memcpy(to, &halves, sizeof halves);
  }
};

template <typename Type>
struct Rows {
  using Element = typename Type::Element;
  using Value = typename Type::Value;
  using Vector = typename Type::Vector;
  static constexpr int64_t kLanes = sizeof(Vector) / sizeof(Value);
  static constexpr int64_t kBlock = 1024;
  static constexpr Value kLowest = std::numeric_limits<Value>::lowest();

  // The last elements of a row, fewer than a vector of them, the other lanes being `rest`.
  static Vector load_part(const Element* from, int64_t count, Value rest) {
    Element elements[kLanes] = {};
    std::memcpy(elements, from, count * sizeof(Element));
    Vector values = Type::load(elements);
    for (int64_t lane = count; lane < kLanes; ++lane) values[lane] = rest;
    return values;
  }

  static void store_part(Element* to, Vector values, int64_t count) {
    Element elements[kLanes];
    Type::store(elements, values);
    std::memcpy(to, elements, count * sizeof(Element));
  }

  static Value load_one(const Element* from) { return load_part(from, 1, 0)[0]; }

  static Value sum(Vector values) {
    double total = 0;
    for (int64_t lane = 0; lane < kLanes; ++lane) total += values[lane];
    return static_cast<Value>(total);
  }

  static Value largest(const Element* row, int64_t width) {
    Vector most[4];
    for (Vector& each : most) each = Vector{} + kLowest;
    int64_t v = 0;
    for (; v + 4 * kLanes <= width; v += 4 * kLanes) {
      for (int64_t part = 0; part < 4; ++part) {
        const Vector z = Type::load(row + v + part * kLanes);
        most[part] = z > most[part] ? z : most[part];
      }
    }
    for (; v < width; v += kLanes) {
      const Vector z = v + kLanes <= width ? Type::load(row + v)
                                           : load_part(row + v, width - v, kLowest);
      most[0] = z > most[0] ? z : most[0];
    }
    Value result = kLowest;
    for (const Vector& each : most) {
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        result = each[lane] > result ? each[lane] : result;
      }
    }
    return result;
  }

  // m = max z, sum exp(z - m), and z at `label` (0 if not in the row)
  static void statistics(const Element* row, int64_t label, int64_t width, Value* out) {
    const Value most = largest(row, width);
    const Vector none = {};
    Vector exponentials = none;
    int64_t v = 0;
    while (v + kLanes <= width) {  // in blocks, whose sums are added up: fewer roundings in a chain
      Vector of_block = none;
      const int64_t end = std::min(v + kBlock, width / kLanes * kLanes);
      for (; v < end; v += kLanes) of_block += exponential(Type::load(row + v) - most);
      exponentials += of_block;
    }
    if (v < width) {
      constexpr Value kNothing = -std::numeric_limits<Value>::infinity();
      exponentials += exponential(load_part(row + v, width - v, kNothing) - most);
    }
    out[0] = most;
    out[1] = sum(exponentials);
    out[2] = 0 <= label && label < width ? load_one(row + label) : 0;
  }

  // d loss / d z in place of z, with d = z - most - log_sum:
  //   factor exp(d), and less factor at the label
  static void gradient(Element* row, int64_t label, int64_t width, Value most, Value log_sum,
                       Value factor) {
    const bool here = 0 <= label && label < width;
    const Value of_label = here ? load_one(row + label) - most - log_sum : 0;
    int64_t v = 0;
    for (; v + kLanes <= width; v += kLanes) {
      Type::store(row + v, factor * exponential(Type::load(row + v) - most - log_sum));
    }
    if (v < width) {
      const Vector z = load_part(row + v, width - v, most);
      store_part(row + v, factor * exponential(z - most - log_sum), width - v);
    }
    if (here) {  // exp(d) - 1 before any rounding: most labels of a trained model have p near 1
      store_part(row + label, Vector{} + factor * std::expm1(of_label), 1);
    }
  }
};

// The three operators over the rows [begin, end) of a job.
template <typename Type>
struct Passes {
  using Element = typename Type::Element;
  using Value = typename Type::Value;

  static Element* row(const Job& job, int64_t r) {
    return static_cast<Element*>(job.logits) + r * job.stride;
  }

  static void gradient_of_row(const Job& job, int64_t r, Value most, Value log_sum) {
    const Value factor = static_cast<const Value*>(job.factors)[r];
    Element* const logits = row(job, r);
    if (factor == 0) {
      std::memset(logits, 0, job.stride * sizeof(Element));
      return;
    }
    Rows<Type>::gradient(logits, job.labels[r] - job.first, job.width, most, log_sum, factor);
    std::memset(logits + job.width, 0, (job.stride - job.width) * sizeof(Element));
  }

  static void statistics(const Job& job, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      Rows<Type>::statistics(row(job, r), job.labels[r] - job.first, job.width,
                             static_cast<Value*>(job.statistics) + r * kStatistics);
    }
  }

  static void gradient(const Job& job, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      gradient_of_row(job, r, static_cast<const Value*>(job.largest)[r],
                      static_cast<const Value*>(job.log_sum)[r]);
    }
  }

  static void both(const Job& job, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {  // the second pass finds the row in the cache
      statistics(job, r, r + 1);
      const Value* const found = static_cast<const Value*>(job.statistics) + r * kStatistics;
      gradient_of_row(job, r, found[0], std::log(found[1]));
    }
  }

  static Pass find(Kind kind) {
    return kind == Kind::kStatistics ? &statistics : kind == Kind::kGradient ? &gradient : &both;
  }
};

inline Pass find(Kind kind, ScalarType type) {
  return type == ScalarType::Double  ? Passes<Double>::find(kind)
         : type == ScalarType::Float ? Passes<Float>::find(kind)
                                     : Passes<BFloat>::find(kind);
}
