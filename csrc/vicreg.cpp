// The three ops of VICReg: fused loops around the matrix products, which BLAS computes.

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "cpu.h"

namespace jepa {
namespace {

constexpr int64_t kColumns = 256;  // per task, summed over all rows

struct Views {  // z [N, M, D] with any strides, D contiguous
    explicit Views(const Tensor& z) : z(with_rows(z)) {}
    template <class T>
    const T* row(int64_t n, int64_t i) const {
        return pointer<const T>(z) + n * z.stride(0) + i * z.stride(1);
    }
    int64_t N() const { return z.size(0); }
    int64_t M() const { return z.size(1); }
    int64_t D() const { return z.size(2); }
    Tensor z;
};

template <class T>
JEPA_VECTOR_CLONES void add(const T* x, double* total, int64_t n) {
    for (int64_t d = 0; d < n; ++d) total[d] += static_cast<Wide<T>>(x[d]);
}

template <class T, class A = Wide<T>>
JEPA_VECTOR_CLONES void add_squares(const T* x, const A* mean, double* total, int64_t n) {
    for (int64_t d = 0; d < n; ++d) {
        const A off = static_cast<A>(x[d]) - mean[d];
        total[d] += off * off;
    }
}

template <class T, class A = Wide<T>>
JEPA_VECTOR_CLONES void center(const T* x, const A* mean, A* to, int64_t n) {
    for (int64_t d = 0; d < n; ++d) to[d] = static_cast<A>(x[d]) - mean[d];
}

template <class A>
JEPA_VECTOR_CLONES A scale_and_square(A* x, A scale, int64_t n) {
    constexpr int64_t kLanes = 16;
    A lanes[kLanes] = {};
    for (int64_t k = 0; k < n / kLanes * kLanes; k += kLanes) {
        for (int64_t l = 0; l < kLanes; ++l) {
            x[k + l] *= scale;
            lanes[l] += x[k + l] * x[k + l];
        }
    }
    for (int64_t k = n / kLanes * kLanes; k < n; ++k) {
        x[k] *= scale;
        lanes[0] += x[k] * x[k];
    }
    A sum = 0;
    for (A lane : lanes) sum += lane;
    return sum;
}

template <class T, class A = Wide<T>>
JEPA_VECTOR_CLONES void combine(const T* x, const A* views, const A* mean, const A* weight, const A* mixed, A pull,
                                A push, T* to, int64_t n) {
    for (int64_t d = 0; d < n; ++d) {
        const A z = static_cast<A>(x[d]);
        to[d] = static_cast<T>(pull * (z - views[d]) + weight[d] * (z - mean[d]) + push * mixed[d]);
    }
}

void check(bool ok) {
    STD_TORCH_CHECK(ok, "vicreg: the shapes or dtypes of an op's arguments do not match");
}

// mean, or another statistic, holds one value per view and channel of z.
void check_views(const Tensor& z, const Tensor& mean) {
    check(z.dim() == 3 && mean.dim() == 2 && mean.size(0) == z.size(1) && mean.size(1) == z.size(2) &&
          mean.scalar_type() == wide_of(z));
}

// x[i, n, :] = z[first + n, i, :] - mean[i, :]
template <class T>
Tensor centered(const Views& z, const Wide<T>* mean, int64_t first, int64_t count) {
    const int64_t M = z.M(), D = z.D();
    const Tensor x = torch::stable::new_empty(z.z, {M, count, D}, wide_of(z.z));
    auto* to = pointer<Wide<T>>(x);
    torch::stable::parallel_for(0, M * count, 64, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            center(z.row<T>(first + r % count, r / count), mean + r / count * D, to + r * D, D);
        }
    });
    return x;
}

// Batched a @ b, contiguous. Autocast, which applies to calls from here too, would return 16 bits.
Tensor product(const Tensor& a, const Tensor& b) {
    const Tensor c = torch::stable::contiguous(torch::stable::matmul(a, b));
    STD_TORCH_CHECK(c.scalar_type() == a.scalar_type(),
                    "vicreg: the matrix product was computed in another dtype; call the ops with autocast disabled");
    return c;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> vicreg_moments(const Tensor& z_NMD) {
    check(z_NMD.dim() == 3);
    const Views z(z_NMD);
    const int64_t N = z.N(), M = z.M(), D = z.D();
    const Tensor mean = torch::stable::new_empty(z.z, {M, D}, wide_of(z.z));
    const Tensor scatter = torch::stable::new_empty(z.z, {M, D}, wide_of(z.z));
    const Tensor spread = torch::stable::new_empty(z.z, {}, wide_of(z.z));
    const int64_t tasks = (D + kColumns - 1) / kColumns;
    dispatch(z.z.scalar_type(), [&](auto type) {
        using T = decltype(type);
        using A = Wide<T>;
        std::vector<double> spreads(tasks);
        torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
            for (int64_t task = begin; task < end; ++task) {
                const int64_t from = task * kColumns, n = std::min(kColumns, D - from);
                double total[kColumns];
                A* means = pointer<A>(mean) + from;
                A* scatters = pointer<A>(scatter) + from;
                for (int64_t i = 0; i < M; ++i) {
                    std::fill(total, total + n, 0);
                    for (int64_t r = 0; r < N; ++r) add(z.row<T>(r, i) + from, total, n);
                    for (int64_t d = 0; d < n; ++d) means[i * D + d] = static_cast<A>(total[d] / N);
                    std::fill(total, total + n, 0);
                    for (int64_t r = 0; r < N; ++r) add_squares(z.row<T>(r, i) + from, means + i * D, total, n);
                    for (int64_t d = 0; d < n; ++d) scatters[i * D + d] = static_cast<A>(total[d]);
                }
                double apart[kColumns] = {};
                A views[kColumns];
                for (int64_t r = 0; r < N; ++r) {
                    std::fill(total, total + n, 0);
                    for (int64_t i = 0; i < M; ++i) add(z.row<T>(r, i) + from, total, n);
                    for (int64_t d = 0; d < n; ++d) views[d] = static_cast<A>(total[d] / M);
                    for (int64_t i = 0; i < M; ++i) add_squares(z.row<T>(r, i) + from, views, apart, n);
                }
                for (int64_t d = 0; d < n; ++d) spreads[task] += apart[d];
            }
        });
        double sum = 0;
        for (double part : spreads) sum += part;
        *pointer<A>(spread) = static_cast<A>(sum);
    });
    return {mean, scatter, spread};
}

std::tuple<Tensor, Tensor> vicreg_products(const Tensor& z_NMD, const Tensor& mean_MD, int64_t rows, bool gram,
                                           bool keep, std::string) {
    check_views(z_NMD, mean_MD);
    const Views z(z_NMD);
    const int64_t M = z.M();
    const Tensor mean = torch::stable::contiguous(mean_MD);
    const Tensor squares = torch::stable::new_empty(mean, {M});
    Tensor matrix = mean;
    dispatch(z.z.scalar_type(), [&](auto type) {
        using T = decltype(type);
        using A = Wide<T>;
        const Tensor x = centered<T>(z, pointer<const A>(mean), 0, z.N());
        const Tensor mirrored = torch::stable::transpose(x, 1, 2);
        matrix = gram ? product(x, mirrored) : product(mirrored, x);
        const int64_t side = matrix.size(1);
        const auto scale = static_cast<A>(1.0 / static_cast<double>(rows - 1));
        torch::stable::parallel_for(0, M, 1, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                double sum = 0;
                for (int64_t s = 0; s < side; ++s) {
                    A* row = pointer<A>(matrix) + (i * side + s) * side;
                    if (!gram) row[s] = 0;
                    sum += scale_and_square(row, scale, side);
                }
                pointer<A>(squares)[i] = static_cast<A>(sum);
            }
        });
    });
    return {squares, keep ? matrix : torch::stable::new_empty(mean, {0})};
}

Tensor vicreg_backward(const Tensor& z_NMD, const Tensor& mean_MD, const Tensor& matrix, const Tensor& weight_MD,
                       const Tensor& pull, const Tensor& push, bool gram, int64_t first, int64_t count, std::string) {
    check_views(z_NMD, mean_MD);
    check_views(z_NMD, weight_MD);
    const int64_t side = gram ? z_NMD.size(0) : z_NMD.size(2);
    check(matrix.dim() == 3 && matrix.size(0) == z_NMD.size(1) && matrix.size(1) == side && matrix.size(2) == side);
    for (const Tensor& t : {matrix, pull, push}) check(t.scalar_type() == mean_MD.scalar_type());
    check(pull.numel() == 1 && push.numel() == 1 && first >= 0 && count >= 0 && first + count <= z_NMD.size(0));
    const Views z(z_NMD);
    const int64_t M = z.M(), D = z.D();
    const Tensor mean = torch::stable::contiguous(mean_MD), weight = torch::stable::contiguous(weight_MD);
    Tensor like = z_NMD;
    Tensor grad = torch::stable::empty_like(torch::stable::narrow(like, 0, first, count));
    const bool dense = D == 1 || grad.stride(2) == 1;
    const Tensor out = dense ? grad : torch::stable::new_empty(grad, {count, M, D});
    dispatch(z.z.scalar_type(), [&](auto type) {
        using T = decltype(type);
        using A = Wide<T>;
        const auto* means = pointer<const A>(mean);
        const auto* weights = pointer<const A>(weight);
        const A a = *pointer<const A>(pull), b = *pointer<const A>(push);
        Tensor rows = matrix;
        if (gram) rows = torch::stable::narrow(rows, 1, first, count);
        const Tensor mixed = gram ? product(rows, centered<T>(z, means, 0, z.N()))
                                  : product(centered<T>(z, means, first, count), matrix);
        torch::stable::parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
            std::vector<double> total(D);
            std::vector<A> views(D);
            for (int64_t n = begin; n < end; ++n) {
                std::fill(total.begin(), total.end(), 0);
                for (int64_t i = 0; i < M; ++i) add(z.row<T>(first + n, i), total.data(), D);
                for (int64_t d = 0; d < D; ++d) views[d] = static_cast<A>(total[d] / M);
                for (int64_t i = 0; i < M; ++i) {
                    combine(z.row<T>(first + n, i), views.data(), means + i * D, weights + i * D,
                            pointer<const A>(mixed) + (i * count + n) * D, a, b,
                            pointer<T>(out) + n * out.stride(0) + i * out.stride(1), D);
                }
            }
        });
    });
    if (!dense) torch::stable::copy_(grad, out);
    return grad;
}

}  // namespace jepa

STABLE_TORCH_LIBRARY_IMPL(jepa_kernels, CPU, m) {
    m.impl("vicreg_moments", TORCH_BOX(&jepa::vicreg_moments));
    m.impl("vicreg_products", TORCH_BOX(&jepa::vicreg_products));
    m.impl("vicreg_backward", TORCH_BOX(&jepa::vicreg_backward));
}
