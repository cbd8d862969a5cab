"""The masks: C++ bitwise against its specification, and both against the distribution, derived independently here.

Statistical tests allow SIGMAS standard errors: a false alarm rate of 2e-9 per comparison if the normal
approximation holds, 1e-5 for the whole file.
"""

import itertools
import math
import random
from collections import Counter
from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa.data.masks import MODES, MaskSpec, block_sizes, philox4x32, sample_masks, sample_masks_ref

SIGMAS = 6.0
GRIDS = [(16, 16), (14, 14)]


def fresh_seed() -> int:
    return random.getrandbits(64)


def contexts(masks) -> list[list[list[int]]]:
    """[E][B] lists of patches, in any mode."""
    if masks.lengths is None:
        return masks.context.tolist()
    E, B = masks.lengths.shape
    parts = [part.tolist() for part in masks.context.split(masks.lengths.flatten().tolist())]
    return [parts[e * B : (e + 1) * B] for e in range(E)]


def same(a, b) -> bool:
    return all(x is y or (torch.equal(x, y) and x.dtype == y.dtype == torch.int64) for x, y in zip(a, b, strict=True))


# --- C++ against the specification


@st.composite
def specs(draw) -> MaskSpec:
    side = st.one_of(st.integers(4, 20), st.sampled_from([64, 65, 73, 128]))
    scale = st.floats(0.1, 1.0)
    law = dict(
        height=draw(side),
        width=draw(side),
        enc_mask_scale=tuple(sorted((draw(st.floats(0.3, 1.0)), draw(st.floats(0.3, 1.0))))),
        pred_mask_scale=tuple(sorted((draw(scale), draw(scale)))),
        aspect_ratio=tuple(sorted((draw(st.floats(0.7, 1.5)), draw(st.floats(0.7, 1.5))))),
        num_enc_masks=draw(st.integers(1, 3)),
        num_pred_masks=draw(st.integers(1, 6)),
        allow_overlap=draw(st.booleans()),
        mode=draw(st.sampled_from(MODES)),
    )
    side_limit = 1 if law["mode"] == "reference" else 0
    root = round(math.sqrt(int(law["height"] * law["width"] * law["enc_mask_scale"][0])))
    smallest = min(root, law["height"] - side_limit) * min(root, law["width"] - side_limit)
    # Up to the largest possible value, at which a context must overlap every target.
    return MaskSpec(**law, min_keep=draw(st.integers(0, smallest - 1)))


@settings(max_examples=200, deadline=None)
@given(specs(), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.data())
def test_kernel_equals_specification(spec, seed, step, data):
    count = data.draw(st.integers(1, 6))
    start = data.draw(st.one_of(st.integers(0, 20), st.just(2**32 - count)))
    first = data.draw(st.integers(start, start + count - 1))
    batch = data.draw(st.integers(1, start + count - first))
    cut = data.draw(st.sampled_from([None, (start, count)]))
    where = dict(seed=seed, step=step, first=first, batch=batch, cut=cut)
    assert same(sample_masks(spec, **where), sample_masks_ref(spec, **where))


@pytest.mark.parametrize("mode", MODES)
def test_any_number_of_threads_draws_the_same(mode):
    spec, threads = MaskSpec(16, 16, num_enc_masks=2, mode=mode), torch.get_num_threads()
    where = dict(seed=fresh_seed(), step=3, first=100, batch=900, cut=(0, 1500))
    drawn = []
    try:
        for n in (1, 2, 4):
            torch.set_num_threads(n)
            drawn.append(sample_masks(spec, **where))
    finally:
        torch.set_num_threads(threads)
    assert same(drawn[0], drawn[1]) and same(drawn[0], drawn[2])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ranks", [2, 4, 12])
def test_any_number_of_ranks_draws_the_same(mode, ranks):
    spec = MaskSpec(14, 14, num_enc_masks=2, mode=mode)
    seed, step, total = fresh_seed(), 7, 24
    whole = sample_masks(spec, seed=seed, step=step, first=0, batch=total)
    share = total // ranks
    parts = [
        sample_masks(spec, seed=seed, step=step, first=rank * share, batch=share, cut=(0, total))
        for rank in range(ranks)
    ]
    assert torch.equal(torch.cat([part.target for part in parts], 1), whole.target)
    for e, expected in enumerate(contexts(whole)):
        assert [kept for part in parts for kept in contexts(part)[e]] == expected


def test_every_bit_of_seed_step_and_image_counts():
    spec, seed, step, image = MaskSpec(16, 16), fresh_seed(), fresh_seed(), random.getrandbits(32)

    def drawn(seed, step, image):
        masks = sample_masks(spec, seed=seed, step=step, first=image, batch=1)
        return tuple(masks.target.flatten().tolist())

    neighbours = [drawn(seed, step, image)]
    neighbours += [drawn(seed ^ 1 << bit, step, image) for bit in range(64)]
    neighbours += [drawn(seed, step ^ 1 << bit, image) for bit in range(64)]
    neighbours += [drawn(seed, step, image ^ 1 << bit) for bit in range(32)]
    # Two samples agree by chance with probability below 2e-6 (four of at least 90 positions each, and the size).
    assert len(neighbours) - len(set(neighbours)) <= 2


def test_philox_known_answers():
    """The test vectors of Random123, the reference implementation."""
    ones, pi = 2**32 - 1, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert philox4x32((0,) * 4, (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox4x32((ones,) * 4, (ones, ones)) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    assert philox4x32(pi, (0xA4093822, 0x299F31D0)) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


# --- the distribution, as the paper describes it


@lru_cache
def target_law(spec: MaskSpec) -> dict[tuple[int, int], float]:
    """Probability of every target size, by integrating over the random numbers that determine it."""
    n = 1 << 16 if spec.mode == "reference" else 1 << 11
    r = (np.arange(n) + 0.5) / n
    s, a = (r, r) if spec.mode == "reference" else np.meshgrid(r, r)
    scale = spec.pred_mask_scale[0] + s * (spec.pred_mask_scale[1] - spec.pred_mask_scale[0])
    aspect = spec.aspect_ratio[0] + a * (spec.aspect_ratio[1] - spec.aspect_ratio[0])
    return size_law(spec, scale, aspect)


@lru_cache
def context_law(spec: MaskSpec) -> dict[tuple[int, int], float]:
    scale = np.linspace(*spec.enc_mask_scale, 1 << 16, endpoint=False)
    return size_law(spec, scale, np.ones_like(scale))


def size_law(spec, scale, aspect) -> dict[tuple[int, int], float]:
    bound = 1 if spec.mode == "reference" else 0
    area = np.floor(spec.height * spec.width * scale)
    h = np.minimum(np.rint(np.sqrt(area * aspect)), spec.height - bound).astype(int)
    w = np.minimum(np.rint(np.sqrt(area / aspect)), spec.width - bound).astype(int)
    counts = np.bincount((h * 256 + w).ravel())
    return {divmod(int(size), 256): counts[size] / h.size for size in np.flatnonzero(counts)}


def draw_by_the_text(spec: MaskSpec, batch: int, rng: np.random.Generator):
    """One batch of uncut `reference` masks: lists [E * B] and [M * B] of boolean grids, image by image."""

    def size(law):
        return list(law)[rng.choice(len(law), p=list(law.values()))]

    def block(size):
        grid = np.zeros((spec.height, spec.width), bool)
        top, left = rng.integers(spec.height - size[0]), rng.integers(spec.width - size[1])
        grid[top : top + size[0], left : left + size[1]] = True
        return grid

    context_size, target_size = size(context_law(spec)), size(target_law(spec))
    all_contexts, all_targets = [], []
    for _ in range(batch):
        targets = [block(target_size) for _ in range(spec.num_pred_masks)]
        all_targets += targets
        for _ in range(spec.num_enc_masks):
            for failures in itertools.count():
                context = block(context_size)
                for target in targets[: max(0, len(targets) - failures // 20)]:
                    context &= ~target
                if context.sum() > spec.min_keep:
                    break
            all_contexts.append(context)
    return all_contexts, all_targets


def assert_equal_means(ours, theirs):
    ours, theirs = np.asarray(ours, float), np.asarray(theirs, float)
    error = np.sqrt(ours.var(0) / len(ours) + theirs.var(0) / len(theirs))
    difference = np.abs(ours.mean(0) - theirs.mean(0))
    assert (difference <= SIGMAS * error + 1e-9).all(), (difference, error)


@pytest.mark.parametrize("mode", ["reference", "unbiased"])
@pytest.mark.parametrize("grid", [*GRIDS, (9, 20)])
def test_block_sizes(grid, mode):
    spec, seed, steps = MaskSpec(*grid, mode=mode), fresh_seed(), 20_000
    drawn = [block_sizes(spec, seed=seed, step=step) for step in range(steps)]
    for law, counts in zip((context_law(spec), target_law(spec)), map(Counter, zip(*drawn, strict=True)), strict=True):
        for size in law.keys() | counts.keys():
            p = law.get(size, 0.0)
            # 1e-3: error of the integration.
            assert abs(counts[size] / steps - p) <= SIGMAS * math.sqrt(p * (1 - p) / steps) + 1e-3, (
                size,
                seed,
            )
    if mode == "reference":
        areas = {h * w for _, (h, w) in drawn}
        contexts = {size for size, _ in drawn}
        if grid == (16, 16):  # observed with the published sampler
            assert areas == {35, 36, 42, 48, 54} and contexts == {(15, 15)}
        if grid == (14, 14):
            assert areas == {30, 35, 36, 40} and contexts == {(13, 13)}


@pytest.mark.parametrize("mode", MODES)
def test_every_patch_is_visible_as_often_as_the_law_says(mode):
    """A batch of one image is not cut: its context is a block minus the targets, all placed independently."""
    spec = MaskSpec(
        random.randint(10, 20),
        random.randint(10, 20),
        num_pred_masks=random.randint(1, 3),
        min_keep=0,
        mode=mode,
    )
    last = 0 if mode == "reference" else 1

    def covered(size):  # [H, W]: the probability that a block covers each patch
        sides = []
        for length, extent in zip(size, (spec.height, spec.width), strict=True):
            places = np.arange(extent - length + last)[:, None]
            cells = np.arange(extent)
            sides.append(((places <= cells) & (cells < places + length)).mean(0))
        return np.outer(*sides)

    seen = sum(p * covered(size) for size, p in context_law(spec).items())
    hidden = sum(p * (1 - covered(size)) ** spec.num_pred_masks for size, p in target_law(spec).items())
    expected_visible = seen * hidden
    expected_target = sum(p * covered(size) for size, p in target_law(spec).items())

    seed, steps = fresh_seed(), 8000
    visible, target = np.zeros(spec.height * spec.width), np.zeros(spec.height * spec.width)
    for step in range(steps):
        masks = sample_masks(spec, seed=seed, step=step, first=step % 5, batch=1)
        visible[masks.context.flatten().numpy()] += 1
        target[masks.target[-1].flatten().numpy()] += 1
    for got, expected in ((visible, expected_visible), (target, expected_target)):
        p = expected.flatten()
        error = SIGMAS * np.sqrt(p * (1 - p) / steps) + 1e-3  # 1e-3: error of the integration
        assert (np.abs(got / steps - p) <= error).all(), (spec, seed)
        if mode == "reference":
            assert not got.reshape(spec.height, spec.width)[-1].any()
            assert not got.reshape(spec.height, spec.width)[:, -1].any()


def test_reference_cuts_as_the_text_says():
    """Length of the cut context and visibility of every row, against `draw_by_the_text`."""
    specs = [MaskSpec(16, 16), MaskSpec(8, 8, num_enc_masks=2, num_pred_masks=3, min_keep=28)]
    for spec, batch, steps in zip(specs, (64, 8), (150, 500), strict=True):
        rng, seed = np.random.default_rng(fresh_seed()), fresh_seed()
        ours, theirs = [], []
        for step in range(steps):
            masks = sample_masks(spec, seed=seed, step=step, first=0, batch=batch)
            rows = np.bincount(masks.context.flatten().numpy() // spec.width, minlength=spec.height)
            ours.append([masks.context.shape[-1], *rows])
            drawn = [np.flatnonzero(grid) for grid in draw_by_the_text(spec, batch, rng)[0]]
            shortest = min(map(len, drawn))
            kept = np.concatenate([context[:shortest] for context in drawn])
            theirs.append([shortest, *np.bincount(kept // spec.width, minlength=spec.height)])
        assert_equal_means(ours, theirs)


def test_targets_are_given_up_one_by_one():
    """With a min_keep that is hard to meet: how many patches contexts keep, and how often they overlap each target."""
    spec = MaskSpec(8, 8, num_pred_masks=3, min_keep=31, mode="reference")
    rng, seed, steps = np.random.default_rng(fresh_seed()), fresh_seed(), 1500
    ours, theirs = [], []
    for step in range(steps):
        masks = sample_masks(spec, seed=seed, step=step, first=0, batch=1)
        context = set(masks.context.flatten().tolist())
        overlaps = [bool(context & set(block)) for block in masks.target[:, 0].tolist()]
        ours.append([len(context), *overlaps])
        (grid,), targets = draw_by_the_text(spec, 1, rng)
        theirs.append([grid.sum(), *((grid & target).any() for target in targets)])
    assert_equal_means(ours, theirs)
    _, first, _, last = np.mean(ours, 0)
    assert first < last and last > 0.05  # overlaps do occur, and the last target is given up first


def test_a_target_is_given_up_after_twenty_failures():
    """One target of 6 x 6 on 8 x 8 patches: a context of 3 x 3 always overlaps it, and keeps all nine patches only
    if the target was given up. Positions are enumerated to compute the probability of that.
    """
    spec = MaskSpec(8, 8, (0.15, 0.15), (0.5625, 0.5625), (1, 1), num_pred_masks=1, min_keep=6, mode="packed")
    seed, images = fresh_seed(), 90_000
    given_up = []
    for ty, tx in itertools.product(range(3), repeat=2):
        kept = np.ones((8, 8))
        kept[ty : ty + 6, tx : tx + 6] = 0
        counts = np.array([kept[y : y + 3, x : x + 3].sum() for y, x in itertools.product(range(6), repeat=2)])
        assert counts.max() < 9
        given_up.append((counts <= 6).mean() ** 20)
    p = np.mean(given_up)
    masks = sample_masks(spec, seed=seed, step=0, first=0, batch=images)
    assert abs((masks.lengths == 9).sum() - images * p) <= SIGMAS * math.sqrt(images * p * (1 - p)), seed


@pytest.mark.parametrize(
    ("grid", "batch", "kept", "before", "per_target"),
    [((16, 16), 128, 69, 110, 44), ((14, 14), 128, 51, 82, 33), ((28, 28), 16, 271, 358, 137)],
)
def test_reference_keeps_what_the_published_sampler_was_measured_to_keep(grid, batch, kept, before, per_target):
    spec, seed, steps = MaskSpec(*grid), fresh_seed(), 400
    drawn = [sample_masks(spec, seed=seed, step=step, first=0, batch=batch) for step in range(steps)]
    uncut = [sample_masks(spec, seed=seed, step=step, first=0, batch=1) for step in range(4 * steps)]
    for sample, expected in (
        ([masks.context.shape[-1] for masks in drawn], kept),
        ([masks.context.shape[-1] for masks in uncut], before),
        ([masks.target.shape[-1] for masks in drawn], per_target),
    ):
        # The measured means are rounded to integers and have a statistical error of their own.
        error = SIGMAS * np.std(sample) / math.sqrt(len(sample))
        assert abs(np.mean(sample) - expected) <= 1 + error, (expected, seed)


@pytest.mark.parametrize("mode", MODES)
def test_blocks_are_what_they_should_be(mode):
    """Targets are rectangles; a context is a square block minus the targets, then cut according to the mode."""
    spec, seed, step = MaskSpec(12, 15, num_enc_masks=2, mode=mode), fresh_seed(), random.getrandbits(30)
    (ch, cw), (th, tw) = block_sizes(spec, seed=seed, step=step)
    masks = sample_masks(spec, seed=seed, step=step, first=0, batch=40)

    def block(top, left, h, w):
        return [y * spec.width + x for y in range(top, top + h) for x in range(left, left + w)]

    for b in range(40):
        targets = masks.target[:, b].tolist()
        assert all(target == block(*divmod(target[0], spec.width), th, tw) for target in targets)
        hidden = {patch for target in targets for patch in target}
        for context in (per_image[b] for per_image in contexts(masks)):
            assert context == sorted(set(context)) and not hidden & set(context)
            places = itertools.product(range(spec.height - ch + 1), range(spec.width - cw + 1))
            whole = [[patch for patch in block(*place, ch, cw) if patch not in hidden] for place in places]
            if mode == "reference":
                assert context in [kept[: len(context)] for kept in whole]
            elif mode == "packed":
                assert context in whole
            else:
                assert any(set(context) <= set(kept) for kept in whole)


def test_overlap_allowed_keeps_the_whole_block():
    spec, seed = MaskSpec(16, 16, allow_overlap=True, mode=random.choice(MODES)), fresh_seed()
    (h, w), _ = block_sizes(spec, seed=seed, step=0)
    for context in contexts(sample_masks(spec, seed=seed, step=0, first=0, batch=20))[0]:
        first = context[0]
        assert context == [first + y * 16 + x for y in range(h) for x in range(w)]


def test_random_cut_is_uniform_over_subsets():
    """All subsets of the kept length are equally likely. A batch of one shows the context before the cut."""
    spec = MaskSpec(3, 3, (0.6, 0.6), (0.2, 0.4), num_pred_masks=1, min_keep=1, mode="unbiased")
    seed, steps = fresh_seed(), 12_000
    subsets: dict[tuple[int, int], Counter] = {}
    for step in range(steps):
        cut = sample_masks(spec, seed=seed, step=step, first=0, batch=2).context[0, 0].tolist()
        whole = sample_masks(spec, seed=seed, step=step, first=0, batch=1).context[0, 0].tolist()
        if len(cut) < len(whole):
            ranks = tuple(whole.index(patch) for patch in cut)
            subsets.setdefault((len(whole), len(cut)), Counter())[ranks] += 1
    assert subsets
    for (n, k), counts in subsets.items():
        assert len(counts) <= math.comb(n, k)
        total, p = counts.total(), 1 / math.comb(n, k)
        for ranks in itertools.combinations(range(n), k):
            assert abs(counts[ranks] - total * p) <= SIGMAS * math.sqrt(total * p * (1 - p)) + SIGMAS, (
                n,
                k,
                seed,
            )


@pytest.mark.parametrize("mode", MODES)
def test_visibility_is_symmetric_except_in_reference(mode):
    """Flipping any one image upside down leaves the distribution unchanged, so given their magnitudes the signs of
    the images' imbalances are fair coin flips: by Hoeffding P(|sum| > 6 sqrt(sum of squares)) is below 4e-8.
    """
    spec, seed = MaskSpec(random.randint(10, 18), random.randint(10, 18), mode=mode), fresh_seed()
    rows, columns = [], []
    for step in range(60):
        for context in contexts(sample_masks(spec, seed=seed, step=step, first=0, batch=64))[0]:
            y, x = np.divmod(context, spec.width)
            rows.append((2 * y - spec.height + 1).sum())
            columns.append((2 * x - spec.width + 1).sum())
    for imbalance in (np.array(rows, float), np.array(columns, float)):
        shift = abs(imbalance.sum()) / np.sqrt((imbalance**2).sum())
        assert (shift > 6) == (mode == "reference"), (spec, seed, shift)


# --- bad input


@pytest.mark.parametrize(
    ("name", "law"),
    [
        ("mode", dict(mode="random")),
        ("height", dict(height=0)),
        ("height", dict(height=1)),  # blocks of mode reference never span a side: no room for one
        ("width", dict(width=16.0)),
        ("width", dict(width=4096)),
        ("enc_mask_scale", dict(enc_mask_scale=(0.9, 0.8))),
        ("enc_mask_scale", dict(enc_mask_scale=(0.9, 1.2))),
        ("pred_mask_scale", dict(pred_mask_scale=(0.0, 0.2))),
        ("pred_mask_scale", dict(pred_mask_scale=(0.1, 0.15, 0.2))),
        ("pred_mask_scale", dict(pred_mask_scale=(0.001, 0.2))),  # the block has no patch
        ("aspect_ratio", dict(aspect_ratio=(0.75, math.inf))),
        ("aspect_ratio", dict(aspect_ratio=(math.nan, 1.0))),
        ("num_enc_masks", dict(num_enc_masks=0)),
        ("num_pred_masks", dict(num_pred_masks=-1)),
        ("min_keep", dict(min_keep=-1)),
        ("min_keep", dict(min_keep=225)),  # all of the 15 x 15 block: the published sampler never returns
    ],
)
def test_a_law_that_cannot_be_drawn_is_refused(name, law):
    with pytest.raises(ValueError, match=name):
        MaskSpec(**{"height": 16, "width": 16, **law})


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("seed", dict(seed=-1)),
        ("seed", dict(seed=2**64)),
        ("step", dict(step=1.5)),
        ("first", dict(first=-1)),
        ("first", dict(first=2**32)),
        ("batch", dict(batch=0)),
        ("batch", dict(first=2**32 - 4, batch=5)),
        ("cut", dict(cut=(9, 8))),
        ("cut", dict(cut=(0, 11))),
        ("cut", dict(cut=(-1, 20))),
        ("cut", dict(cut=(0, 2**32 + 1))),
    ],
)
@pytest.mark.parametrize("sample", [sample_masks, sample_masks_ref])
def test_a_batch_that_does_not_exist_is_refused(sample, name, where):
    with pytest.raises(ValueError, match=name):
        sample(MaskSpec(16, 16), **{"seed": 0, "step": 0, "first": 8, "batch": 4, **where})


def test_kernel_refuses_what_would_write_out_of_bounds():
    if not torch._C._dispatch_has_kernel_for_dispatch_key("jepa_masks::sample", "CPU"):
        pytest.skip("built without csrc")
    good = dict(sizes=[[15, 15], [6, 6]], mode="reference", height=16, width=16, contexts=1, targets=4, min_keep=10)
    good |= dict(allow_overlap=False, seed=0, step=0, first=0, batch=4, cut_first=0, cut_count=4)
    for bad in (
        dict(sizes=[[16, 15], [6, 6]]),
        dict(sizes=[[15, 15], [6, 16]]),
        dict(sizes=[[15, 15], [0, 6]]),
        dict(sizes=[[15, 15]]),
        dict(mode="other"),
        dict(height=1 << 40),
        dict(contexts=1 << 40),
        dict(targets=0),
        dict(min_keep=225),
        dict(batch=5),
        dict(first=-1),
        dict(cut_first=1),
        dict(cut_count=1 << 62),
    ):
        arguments = good | bad
        with pytest.raises(RuntimeError, match="jepa_masks::sample"):
            torch.ops.jepa_masks.sample(**arguments | {"sizes": torch.tensor(arguments["sizes"])})
    with pytest.raises(RuntimeError, match="int64"):
        torch.ops.jepa_masks.sample(**good | {"sizes": torch.tensor(good["sizes"], dtype=torch.int32)})
