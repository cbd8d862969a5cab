// SIGReg: sums over rows of cos(t x) and sin(t x) at equally spaced t, and the gradient through them.
//
// One cosine and sine per x; those of its multiples follow by rotation, kept in registers.

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "cpu.h"
#include "philox.h"

namespace jepa {
namespace {

constexpr int64_t kLanes = 16;         // slices that are rotated together
constexpr int64_t kSlices = 64;        // per task: 4 cache lines of a row
constexpr int64_t kRows = 4;           // rotated together: their sums are stored once
constexpr int64_t kBlock = 128;        // rows summed in the dtype of x, before they are added in double
constexpr uint32_t kPurpose = 0x51C3;  // keeps the random words apart from others drawn with the same seed and step
constexpr double kWords = 4294967296;  // 2^32
constexpr double kTau = 6.283185307179586476925;

template <class A>
using Tile = std::array<A, kRows * kSlices>;

// cos and sin of 2 pi turns x, for any x: reduced in double, by half turns; then Taylor's series, nested, for angles up
// to a quarter turn.
template <class A>
JEPA_VECTOR_CLONES void unit_circle(const A* x, double turns, A* cosine, A* sine) {
    constexpr int kTerms = std::is_same_v<A, double> ? 10 : 6;
    for (int64_t l = 0; l < kSlices; ++l) {
        double turned = static_cast<double>(x[l]) * turns;
        turned -= std::floor(turned);
        const double half = std::floor(2 * turned + 0.5);
        const A angle = static_cast<A>((turned - half / 2) * kTau);
        const A sign = half == 1 ? A(-1) : A(1);
        const A square = angle * angle;
        A c = 1, s = 1;
        for (int j = kTerms; j > 0; --j) {
            c = 1 - c * (square * static_cast<A>(1.0 / ((2 * j - 1) * (2 * j))));
            s = 1 - s * (square * static_cast<A>(1.0 / ((2 * j) * (2 * j + 1))));
        }
        cosine[l] = sign * c;
        sine[l] = sign * s * angle;
    }
}

// Adds the first K powers of step_c + i step_s, over kRows rows, to sums [K, 2, kSlices].
template <class A>
JEPA_VECTOR_CLONES void add_powers(const A* step_c, const A* step_s, A* sums, int64_t K) {
    for (int64_t from = 0; from < kSlices; from += kLanes) {
        A a[kRows][kLanes], b[kRows][kLanes], c[kRows][kLanes], s[kRows][kLanes];
        for (int64_t r = 0; r < kRows; ++r) {
            for (int64_t l = 0; l < kLanes; ++l) {
                c[r][l] = a[r][l] = step_c[r * kSlices + from + l];
                s[r][l] = b[r][l] = step_s[r * kSlices + from + l];
            }
        }
        A* to = sums + from;
        for (int64_t k = 0; k < K; ++k, to += 2 * kSlices) {
            for (int64_t l = 0; l < kLanes; ++l) {
                A cosines = 0, sines = 0;
                for (int64_t r = 0; r < kRows; ++r) {
                    cosines += c[r][l];
                    sines += s[r][l];
                    const A turned = c[r][l] * a[r][l] - s[r][l] * b[r][l];
                    s[r][l] = s[r][l] * a[r][l] + c[r][l] * b[r][l];
                    c[r][l] = turned;
                }
                to[l] += cosines;
                to[kSlices + l] += sines;
            }
        }
    }
}

// The real part of the sum of (sines_k + i cosines_k) (step_c + i step_s)^k, k = 1..K, by Horner's rule, for kRows
// rows; coefficients [K, 2, kSlices] are cosines, sines.
template <class A>
JEPA_VECTOR_CLONES void evaluate(const A* step_c, const A* step_s, const A* coefficients, int64_t K, A* out) {
    for (int64_t from = 0; from < kSlices; from += kLanes) {
        A a[kRows][kLanes], b[kRows][kLanes], real[kRows][kLanes] = {}, imaginary[kRows][kLanes] = {};
        for (int64_t r = 0; r < kRows; ++r) {
            for (int64_t l = 0; l < kLanes; ++l) {
                a[r][l] = step_c[r * kSlices + from + l];
                b[r][l] = step_s[r * kSlices + from + l];
            }
        }
        const A* of_k = coefficients + K * 2 * kSlices + from;
        for (int64_t k = 0; k < K; ++k) {
            of_k -= 2 * kSlices;
            for (int64_t l = 0; l < kLanes; ++l) {
                for (int64_t r = 0; r < kRows; ++r) {
                    const A re = real[r][l] + of_k[kSlices + l], im = imaginary[r][l] + of_k[l];
                    real[r][l] = re * a[r][l] - im * b[r][l];
                    imaginary[r][l] = im * a[r][l] + re * b[r][l];
                }
            }
        }
        for (int64_t r = 0; r < kRows; ++r) {  // not std::copy, for which `real` would have to lie in memory
            for (int64_t l = 0; l < kLanes; ++l) out[r * kSlices + from + l] = real[r][l];
        }
    }
}

template <class A>
JEPA_VECTOR_CLONES void add(const A* x, double* total, int64_t n) {
    for (int64_t i = 0; i < n; ++i) total[i] += x[i];
}

// Four standard normals per counter (index, kPurpose, step), for the kSlices / 2 counters from `first` on.
JEPA_VECTOR_CLONES void normals(uint32_t first, uint64_t seed, uint64_t step, float* out) {
    constexpr int64_t kPairs = kSlices;
    double radius[kPairs], angle[kPairs], cosine[kPairs], sine[kPairs];
    for (int64_t i = 0; i < kPairs / 2; ++i) {
        const auto word = philox4x32({first + static_cast<uint32_t>(i), kPurpose, static_cast<uint32_t>(step),
                                      static_cast<uint32_t>(step >> 32)},
                                     seed);
        radius[2 * i] = word[0];
        angle[2 * i] = word[1];
        radius[2 * i + 1] = word[2];
        angle[2 * i + 1] = word[3];
    }
    unit_circle(angle, 1 / kWords, cosine, sine);
    for (int64_t i = 0; i < kPairs; ++i) {
        const double length = std::sqrt(-2 * std::log((radius[i] + 0.5) / kWords));  // Box and Muller
        out[2 * i] = static_cast<float>(length * cosine[i]);
        out[2 * i + 1] = static_cast<float>(length * sine[i]);
    }
}

struct Projections {  // x [V, N, S], contiguous, in tasks of kSlices slices of a view
    explicit Projections(const Tensor& x_VNS)
        : x(torch::stable::contiguous(x_VNS)), V(x.size(0)), N(x.size(1)), S(x.size(2)) {}
    int64_t blocks() const { return (S + kSlices - 1) / kSlices; }
    int64_t first(int64_t task) const { return task % blocks() * kSlices; }
    int64_t width(int64_t task) const { return std::min(kSlices, S - first(task)); }
    int64_t at(int64_t task, int64_t n) const { return (task / blocks() * N + n) * S + first(task); }

    // cos and sin of 2 pi turns x of `count` rows from n on; of missing slices too; of missing rows, 0.
    template <class A>
    void circle(int64_t task, int64_t n, int64_t count, double turns, Tile<A>& cosine, Tile<A>& sine) const {
        for (int64_t r = 0; r < count; ++r) {
            const A* row = pointer<const A>(x) + at(task, n + r);
            A padded[kSlices] = {};
            if (width(task) < kSlices) {
                std::copy_n(row, width(task), padded);
                row = padded;
            }
            unit_circle(row, turns, &cosine[r * kSlices], &sine[r * kSlices]);
        }
        std::fill(cosine.begin() + count * kSlices, cosine.end(), A(0));
        std::fill(sine.begin() + count * kSlices, sine.end(), A(0));
    }

    template <class F>
    void each_task(const F& f) const {
        const int64_t bytes = N * kSlices * static_cast<int64_t>(sizeof(float));
        torch::stable::parallel_for(0, V * blocks(), grain(bytes), [&](int64_t begin, int64_t end) {
            for (int64_t task = begin; task < end; ++task) f(task);
        });
    }

    Tensor x;
    int64_t V, N, S;
};

void check(bool ok) {
    STD_TORCH_CHECK(ok, "sigreg: the shapes or dtypes of an op's arguments do not match");
}

// Calls f(A()) with the type of x, which is float or double.
template <class F>
void dispatch_wide(const Tensor& x, const F& f) {
    check(x.scalar_type() == wide_of(x));
    x.scalar_type() == ScalarType::Double ? f(double()) : f(float());
}

}  // namespace

void sigreg_normals_(const Tensor& out, int64_t seed, int64_t step) {
    check(out.scalar_type() == ScalarType::Float && out.is_contiguous());
    constexpr int64_t kBatch = 2 * kSlices;
    const int64_t count = out.numel();
    torch::stable::parallel_for(0, (count + kBatch - 1) / kBatch, 64, [&](int64_t begin, int64_t end) {
        float drawn[kBatch];
        for (int64_t i = begin; i < end; ++i) {
            normals(static_cast<uint32_t>(i * kBatch / 4), seed, step, drawn);
            std::copy_n(drawn, std::min(kBatch, count - i * kBatch), pointer<float>(out) + i * kBatch);
        }
    });
}

Tensor sigreg_table(const Tensor& x_VNS, double step, const std::vector<double>& phi,
                    const std::vector<double>& weight) {
    check(phi.size() == weight.size() && x_VNS.dim() == 3);
    const Projections x(x_VNS);
    const auto K = static_cast<int64_t>(phi.size());
    const Tensor table = torch::stable::new_empty(x.x, {K, 2, x.V, x.S});
    dispatch_wide(x.x, [&](auto type) {
        using A = decltype(type);
        x.each_task([&](int64_t task) {
            Tile<A> cosine, sine;
            std::vector<A> sums(K * 2 * kSlices);
            std::vector<double> totals(K * 2 * kSlices);
            for (int64_t n = 0; n < x.N; n += kRows) {
                x.circle(task, n, std::min(kRows, x.N - n), step / kTau, cosine, sine);
                add_powers(cosine.data(), sine.data(), sums.data(), K);
                if ((n + kRows) % kBlock == 0 || n + kRows >= x.N) {
                    add(sums.data(), totals.data(), K * 2 * kSlices);
                    std::fill(sums.begin(), sums.end(), A(0));
                }
            }
            for (int64_t i = 0; i < 2 * K; ++i) {
                const double expected = i % 2 ? 0 : phi[i / 2] * static_cast<double>(x.N);
                A* to = pointer<A>(table) + (i * x.V + task / x.blocks()) * x.S + x.first(task);
                for (int64_t l = 0; l < x.width(task); ++l) {
                    to[l] = static_cast<A>((totals[i * kSlices + l] - expected) * weight[i / 2]);
                }
            }
        });
    });
    return table;
}

Tensor sigreg_backward(const Tensor& x_VNS, const Tensor& table_K2VS, const Tensor& scale, double step,
                       const std::vector<double>& slope) {
    check(x_VNS.dim() == 3 && table_K2VS.dim() == 4);
    const Projections x(x_VNS);
    const auto K = static_cast<int64_t>(slope.size());
    check(table_K2VS.size(0) == K && table_K2VS.size(1) == 2 && table_K2VS.size(2) == x.V && table_K2VS.size(3) == x.S);
    check(table_K2VS.scalar_type() == x.x.scalar_type() && scale.scalar_type() == x.x.scalar_type() &&
          scale.numel() == 1);
    const Tensor table = torch::stable::contiguous(table_K2VS);
    const Tensor grad = torch::stable::new_empty(x.x, {x.V, x.N, x.S});
    dispatch_wide(x.x, [&](auto type) {
        using A = decltype(type);
        const double by = *pointer<const A>(scale);
        x.each_task([&](int64_t task) {
            Tile<A> cosine, sine, out;
            std::vector<A> coefficients(K * 2 * kSlices);
            for (int64_t i = 0; i < 2 * K; ++i) {
                const A* from = pointer<const A>(table) + (i * x.V + task / x.blocks()) * x.S + x.first(task);
                for (int64_t l = 0; l < x.width(task); ++l) {
                    coefficients[i * kSlices + l] = static_cast<A>(from[l] * slope[i / 2] * by);
                }
            }
            for (int64_t n = 0; n < x.N; n += kRows) {
                const int64_t count = std::min(kRows, x.N - n);
                x.circle(task, n, count, step / kTau, cosine, sine);
                evaluate(cosine.data(), sine.data(), coefficients.data(), K, out.data());
                for (int64_t r = 0; r < count; ++r) {
                    std::copy_n(&out[r * kSlices], x.width(task), pointer<A>(grad) + x.at(task, n + r));
                }
            }
        });
    });
    return grad;
}

}  // namespace jepa

STABLE_TORCH_LIBRARY_IMPL(jepa_kernels, CPU, m) {
    m.impl("sigreg_normals_", TORCH_BOX(&jepa::sigreg_normals_));
    m.impl("sigreg_table", TORCH_BOX(&jepa::sigreg_table));
    m.impl("sigreg_backward", TORCH_BOX(&jepa::sigreg_backward));
}
