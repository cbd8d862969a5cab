// The multi-block masks of I-JEPA, bit for bit equal to the specification in engine/jepa/data/masks.py.
//
// A context is a bit set of patches in raster order: a block is a run of bits per row, the length of a context is a
// popcount, and the indices come out ascending. Two passes: place the blocks of every image and count; then, once the
// shortest context is known, write the contexts of this batch. Integers only.

#include <algorithm>
#include <array>
#include <bit>
#include <string>
#include <tuple>
#include <vector>

#include "cpu.h"
#include "philox.h"

namespace jepa {
namespace {

constexpr int kTries = 20;  // placements tried for a context before one more target may overlap it
constexpr int64_t kMaxSide = 1024, kMaxBlocks = 1024, kMaxImages = int64_t{1} << 32;
constexpr uint32_t kPlaces = 1, kCuts = 2;  // streams of random words; stream 0 drew the sizes, in Python
constexpr int64_t kGrain = 256;             // images per task, 0.1 ms or more: a smaller batch uses one thread

// The random words of one (seed, step, image, stream).
class Words {
  public:
    Words(uint64_t seed, uint64_t step, int64_t image, uint32_t stream)
        : seed_(seed), step_(step), image_(static_cast<uint32_t>(image)), stream_(stream) {}

    int64_t below(int64_t n) {
        if (next_ == 4) refill();
        return static_cast<int64_t>(word_[next_++] * static_cast<uint64_t>(n) >> 32);
    }

  private:
    void refill() {
        word_ = philox4x32(
            {4 * block_++ + stream_, image_, static_cast<uint32_t>(step_), static_cast<uint32_t>(step_ >> 32)}, seed_);
        next_ = 0;
    }

    uint64_t seed_, step_;
    uint32_t image_, stream_, block_ = 0, next_ = 4;
    std::array<uint32_t, 4> word_;
};

struct Size {
    int64_t height, width;
};

struct Place {
    int64_t top, left;
};

struct Grid {
    int64_t height, width;
    int64_t margin;  // 1: the last position in each direction is never used

    int64_t words() const { return (height * width + 63) / 64; }

    Place draw(Words& random, Size size) const {
        const int64_t top = random.below(height - size.height + 1 - margin);
        return {top, random.below(width - size.width + 1 - margin)};
    }

    // Calls f(word, mask) for each word of `bits` that a block covers.
    template <class F>
    void each(Place place, Size size, uint64_t* bits, F f) const {
        for (int64_t y = 0; y < size.height; ++y) {
            int64_t begin = (place.top + y) * width + place.left;
            for (int64_t left = size.width; left > 0;) {
                const int64_t shift = begin % 64, run = std::min<int64_t>(left, 64 - shift);
                f(bits[begin / 64], (~uint64_t{0} >> (64 - run)) << shift);
                begin += run;
                left -= run;
            }
        }
    }

    int64_t* write(Place place, Size size, int64_t* to) const {
        for (int64_t y = 0; y < size.height; ++y) {
            for (int64_t x = 0; x < size.width; ++x) *to++ = (place.top + y) * width + place.left + x;
        }
        return to;
    }
};

// Places a context that keeps more than min_keep patches outside the targets, and returns how many it keeps.
// Ends after at most kTries * excluded + 1 placements: the caller has checked that a whole block is enough.
int64_t draw_context(const Grid& grid, Words& random, Size size, Size target_size, const std::vector<Place>& targets,
                     int64_t excluded, int64_t min_keep, uint64_t* bits) {
    for (int tries = 0;; ++tries) {
        if (tries == kTries && excluded > 0) {
            --excluded;
            tries = 0;
        }
        std::fill_n(bits, grid.words(), 0);
        grid.each(grid.draw(random, size), size, bits, [](uint64_t& word, uint64_t mask) { word |= mask; });
        for (int64_t m = 0; m < excluded; ++m) {
            grid.each(targets[m], target_size, bits, [](uint64_t& word, uint64_t mask) { word &= ~mask; });
        }
        int64_t kept = 0;
        for (int64_t i = 0; i < grid.words(); ++i) kept += std::popcount(bits[i]);
        if (kept > min_keep) return kept;
    }
}

// Writes the positions of set bits, ascending, that keep() accepts: at most `count`.
template <class Keep>
void write_bits(const uint64_t* bits, int64_t words, int64_t* to, int64_t count, Keep keep) {
    int64_t* const end = to + count;
    for (int64_t i = 0; i < words && to < end; ++i) {
        for (uint64_t word = bits[i]; word != 0 && to < end; word &= word - 1) {
            *to = i * 64 + std::countr_zero(word);
            to += keep();  // no branch: it could not be predicted
        }
    }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> sample_masks(const Tensor& sizes, const std::string& mode, int64_t height,
                                                int64_t width, int64_t contexts, int64_t targets, int64_t min_keep,
                                                bool allow_overlap, int64_t seed, int64_t step, int64_t first,
                                                int64_t batch, int64_t cut_first, int64_t cut_count) {
    const bool reference = mode == "reference", packed = mode == "packed";
    const auto in = [](int64_t value, int64_t low, int64_t high) { return low <= value && value <= high; };
    STD_TORCH_CHECK(reference || packed || mode == "unbiased", "jepa_masks::sample: unknown mode ", mode);
    STD_TORCH_CHECK(in(height, 1, kMaxSide) && in(width, 1, kMaxSide), "jepa_masks::sample: invalid grid of ", height,
                    " x ", width, " patches");
    STD_TORCH_CHECK(in(contexts, 1, kMaxBlocks) && in(targets, 1, kMaxBlocks),
                    "jepa_masks::sample: invalid number of contexts or targets: ", contexts, " and ", targets);
    STD_TORCH_CHECK(in(cut_first, 0, kMaxImages - 1) && in(cut_count, 1, kMaxImages - cut_first) &&
                        in(first, cut_first, cut_first + cut_count - 1) && in(batch, 1, cut_first + cut_count - first),
                    "jepa_masks::sample: images ", first, " + ", batch, " are not within the cut ", cut_first, " + ",
                    cut_count);
    STD_TORCH_CHECK(
        sizes.dim() == 2 && sizes.numel() == 4 && sizes.size(0) == 2 && sizes.scalar_type() == ScalarType::Long,
        "jepa_masks::sample: sizes must be int64 [2, 2]");
    const Tensor sizes_22 = torch::stable::contiguous(sizes);
    const auto* size = pointer<const int64_t>(sizes_22);
    const Size context_size{size[0], size[1]}, target_size{size[2], size[3]};
    const Grid grid{height, width, reference ? 1 : 0};
    for (const Size& block : {context_size, target_size}) {
        STD_TORCH_CHECK(in(block.height, 1, height - grid.margin) && in(block.width, 1, width - grid.margin),
                        "jepa_masks::sample: a block of ", block.height, " x ", block.width,
                        " patches does not fit a grid of ", height, " x ", width);
    }
    STD_TORCH_CHECK(in(min_keep, 0, context_size.height * context_size.width - 1), "jepa_masks::sample: min_keep ",
                    min_keep, " is out of range for contexts of ", context_size.height, " x ", context_size.width);

    const int64_t target_count = target_size.height * target_size.width, words = grid.words();
    const Tensor target_MBK = torch::stable::new_empty(sizes, {targets, batch, target_count});
    const Tensor lengths_EB = torch::stable::new_empty(sizes, {contexts, batch});
    auto* target = pointer<int64_t>(target_MBK);
    auto* lengths = pointer<int64_t>(lengths_EB);
    std::vector<uint64_t> bits_EBW(contexts * batch * words);

    // Lengths are needed for all images that are cut to the same length, blocks only for this batch.
    const int64_t cut_begin = packed ? first : cut_first;
    const int64_t cut_end = packed ? first + batch : cut_first + cut_count;
    std::vector<int64_t> shortest(cut_end - cut_begin);
    torch::stable::parallel_for(cut_begin, cut_end, kGrain, [&](int64_t begin, int64_t end) {
        std::vector<Place> places(targets);
        std::vector<uint64_t> scratch(words);
        for (int64_t image = begin; image < end; ++image) {
            const int64_t b = image - first;
            const bool ours = in(b, 0, batch - 1);
            Words random(seed, step, image, kPlaces);
            for (int64_t m = 0; m < targets; ++m) {
                places[m] = grid.draw(random, target_size);
                if (ours) grid.write(places[m], target_size, target + (m * batch + b) * target_count);
            }
            int64_t least = height * width;
            for (int64_t e = 0; e < contexts; ++e) {
                uint64_t* bits = ours ? &bits_EBW[(e * batch + b) * words] : scratch.data();
                const int64_t kept = draw_context(grid, random, context_size, target_size, places,
                                                  allow_overlap ? 0 : targets, min_keep, bits);
                if (ours) lengths[e * batch + b] = kept;
                least = std::min(least, kept);
            }
            shortest[image - cut_begin] = least;
        }
    });

    const int64_t cut = *std::min_element(shortest.begin(), shortest.end());
    std::vector<int64_t> offsets(contexts * batch + 1);  // of each context in the indices written
    for (int64_t i = 0; i < contexts * batch; ++i) offsets[i + 1] = offsets[i] + (packed ? lengths[i] : cut);
    const Tensor context_EBK = packed ? torch::stable::new_empty(sizes, {offsets.back()})
                                      : torch::stable::new_empty(sizes, {contexts, batch, cut});
    auto* context = pointer<int64_t>(context_EBK);
    torch::stable::parallel_for(0, batch, kGrain, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
            Words random(seed, step, first + b, kCuts);
            for (int64_t e = 0; e < contexts; ++e) {
                const int64_t i = e * batch + b;
                const uint64_t* bits = &bits_EBW[i * words];
                int64_t* to = context + offsets[i];
                if (reference || packed) {
                    write_bits(bits, words, to, offsets[i + 1] - offsets[i], [] { return true; });
                    continue;
                }
                // Selection sampling: Knuth, TAOCP volume 2, 3.4.2, algorithm S.
                int64_t left = lengths[i], needed = cut;
                write_bits(bits, words, to, cut, [&] {
                    const bool keep = random.below(left--) < needed;
                    needed -= keep;
                    return keep;
                });
            }
        }
    });
    return {context_EBK, target_MBK, lengths_EB};
}

}  // namespace jepa

STABLE_TORCH_LIBRARY_IMPL(jepa_masks, CPU, m) {
    m.impl("sample", TORCH_BOX(&jepa::sample_masks));
}
