// Random words that depend on a counter and a key only.
#pragma once

#include <array>
#include <cstdint>

namespace jepa {

// Philox4x32-10 (Salmon et al., SC 2011).
inline std::array<uint32_t, 4> philox4x32(const std::array<uint32_t, 4>& counter, uint64_t key) {
    auto [a, b, c, d] = counter;
    uint32_t k = static_cast<uint32_t>(key), l = static_cast<uint32_t>(key >> 32);
    for (int round = 0; round < 10; ++round) {
        const uint64_t p = uint64_t{0xD2511F53} * a, q = uint64_t{0xCD9E8D57} * c;
        a = static_cast<uint32_t>(q >> 32) ^ b ^ k;
        c = static_cast<uint32_t>(p >> 32) ^ d ^ l;
        b = static_cast<uint32_t>(q);
        d = static_cast<uint32_t>(p);
        k += 0x9E3779B9;
        l += 0xBB67AE85;
    }
    return {a, b, c, d};
}

}  // namespace jepa
