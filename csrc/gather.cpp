// y[b, k, :] = x[b, index[b, k], :] for any dtype: rows are copied as bytes.

#include "cpu.h"

#include <cstring>

namespace jepa {

Tensor gather(const Tensor& x_BND, const Tensor& index_BK) {
    const int64_t B = index_BK.sizes()[0], K = index_BK.sizes()[1], N = x_BND.sizes()[1], D = x_BND.sizes()[2];
    const Tensor x = torch::stable::contiguous(x_BND), index = torch::stable::contiguous(index_BK);
    const Tensor y = torch::stable::new_empty(x_BND, {B, K, D});
    const auto* from = pointer<const char>(x);
    auto* to = pointer<char>(y);
    const auto* rows = pointer<const int64_t>(index);
    const int64_t row_bytes = D * static_cast<int64_t>(x.element_size());
    const int64_t grain = std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(1, row_bytes));
    torch::stable::parallel_for(0, B * K, grain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            std::memcpy(to + i * row_bytes, from + ((i / K) * N + rows[i]) * row_bytes, row_bytes);
        }
    });
    return y;
}

}  // namespace jepa

STABLE_TORCH_LIBRARY_IMPL(jepa_kernels, CPU, m) { m.impl("gather", TORCH_BOX(&jepa::gather)); }
