from __future__ import annotations

import itertools

import pytest
from coco_example.data.sampler import ResumableSampler
from coco_example.errors import DataError


def take(sampler: ResumableSampler, count: int) -> list[list[tuple[int, int]]]:
    return list(itertools.islice(sampler, count))


class TestSampler:
    def test_an_epoch_is_a_permutation_without_the_incomplete_batch(self):
        sampler = ResumableSampler(23, 4, seed=1)
        assert sampler.batches_per_epoch == 5
        batches = take(sampler, 15)
        orders = []
        for epoch in range(3):
            keys = [key for batch in batches[5 * epoch : 5 * epoch + 5] for key in batch]
            assert {e for e, _ in keys} == {epoch}
            orders.append([i for _, i in keys])
            assert len(set(orders[-1])) == 20
            assert set(orders[-1]) <= set(range(23))
        assert len(set(map(tuple, orders))) == 3
        assert set().union(*orders) == set(range(23))  # what one epoch leaves out, another one shows

    @pytest.mark.parametrize("start", [1, 4, 5, 12])
    def test_resuming_gives_the_batches_of_an_uninterrupted_run(self, start):
        whole = take(ResumableSampler(23, 2, seed=5, rank=1, world_size=2), 20)
        rest = take(ResumableSampler(23, 2, seed=5, rank=1, world_size=2, start_batch=start), 20 - start)
        assert rest == whole[start:]

    def test_every_iteration_starts_anew(self):
        sampler = ResumableSampler(23, 4, start_batch=3)
        assert take(sampler, 7) == take(sampler, 7)

    @pytest.mark.parametrize(("batch_size", "world_size"), [(8, 1), (4, 2), (2, 4)])
    def test_ranks_share_a_global_batch(self, batch_size, world_size):
        alone = take(ResumableSampler(50, 8, seed=2), 13)
        ranks = [
            take(ResumableSampler(50, batch_size, seed=2, rank=rank, world_size=world_size), 13)
            for rank in range(world_size)
        ]
        for k in range(13):
            parts = [set(batches[k]) for batches in ranks]
            assert sum(map(len, parts)) == len(set().union(*parts)) == 8
            assert set().union(*parts) == set(alone[k])

    def test_a_small_set_still_fills_a_batch_on_every_rank(self):
        ranks = [take(ResumableSampler(3, 2, rank=rank, world_size=4), 2) for rank in range(4)]
        for k in range(2):
            indices = [i for batches in ranks for _, i in batches[k]]
            assert len(indices) == 8
            assert {indices.count(i) for i in range(3)} == {2, 3}

    def test_seeds_differ(self):
        assert take(ResumableSampler(23, 4, seed=0), 3) != take(ResumableSampler(23, 4, seed=1), 3)

    @pytest.mark.parametrize(
        ("length", "options"),
        [(0, {}), (5, {"rank": 2, "world_size": 2}), (5, {"rank": -1}), (5, {"start_batch": -1})],
    )
    def test_rejects_what_cannot_be_sampled(self, length, options):
        with pytest.raises(DataError, match=r"at least one image and a rank below world_size"):
            ResumableSampler(length, 2, **options)

    def test_batches_of_several_sizes_are_the_same_images_and_all_ranks_have_one_size(self):
        sides = (480, 640, 800)
        plain = take(ResumableSampler(50, 8, seed=2), 40)
        ranks = [
            take(ResumableSampler(50, 4, seed=2, rank=rank, world_size=2, short_sides=sides), 40) for rank in range(2)
        ]
        for k, keys in enumerate(plain):
            [side] = {key[2] for batches in ranks for key in batches[k]}
            assert side in sides
            assert sorted((epoch, i) for batches in ranks for epoch, i, _ in batches[k]) == sorted(keys)
        drawn = [batch[0][2] for batch in ranks[0]]
        assert all(drawn.count(side) >= 5 for side in sides)
        late = ResumableSampler(50, 4, seed=2, rank=1, world_size=2, short_sides=sides, start_batch=17)
        assert take(late, 23) == ranks[1][17:]
