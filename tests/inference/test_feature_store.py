"""The feature store: views are encoded once, in batches of a kind, and give their room back."""

import numpy as np
import pytest

from stepjax.inference.feature_store import VIEW_KINDS, FeatureStore, view_digests


@pytest.fixture
def store(small_images):
    return FeatureStore(24, small_images)  # a global view takes 4, a crop 1


def batch_of(store, size=4):
    kind, batch = store.next_batch(dict.fromkeys(VIEW_KINDS, size))
    return kind, [pixels_HWC for _, pixels_HWC in batch]


def test_batches_are_of_one_kind_and_of_several_prompts(store, make_example):
    first, second = make_example((2, 1), 3, seed=1), make_example((1, 1), (0, 0), 3, seed=2)
    held = [store.hold(example, view_digests(example)) for example in (first, second)]
    crops = [*first.crops, *second.crops]
    kind, pixels = batch_of(store, size=2)
    assert kind == "crop"
    np.testing.assert_array_equal(pixels, crops[:2])
    assert [view.encoded for view in held[0]] == [True, True, False]
    kind, pixels = batch_of(store)  # the first prompt's global view has waited longest, of what is left
    assert kind == "global"
    np.testing.assert_array_equal(pixels, [*first.global_views, *second.global_views])
    kind, pixels = batch_of(store)
    assert kind == "crop"
    np.testing.assert_array_equal(pixels, crops[2:])
    assert all(view.encoded for views in held for view in views)
    rows = np.concatenate([view.rows_Q for views in held for view in views])
    assert len(set(rows)) == len(rows) == 3 + 3 * 4


def test_a_view_of_two_prompts_is_encoded_once(store, make_example):
    example = make_example((0, 0), 3)
    digests = view_digests(example)
    (view,) = store.hold(example, digests)
    assert store.hold(example, digests) == [view]
    store.release(digests)  # the other prompt waits for it still
    assert batch_of(store)[0] == "global" and view.encoded
    store.release(digests)
    assert store.hold(example, digests) == [view]  # kept, though nobody held it
    assert store.num_found == 2


def test_views_that_nobody_waits_for_are_not_encoded(store, make_example):
    gone, next_one = make_example(*[(0, 0)] * 4, 3, seed=1), make_example(*[(0, 0)] * 6, 3, seed=2)
    assert store.hold(gone, view_digests(gone))
    assert store.hold(next_one, view_digests(next_one)) is None  # no room
    store.release(view_digests(gone))
    assert store.hold(next_one, view_digests(next_one))
    np.testing.assert_array_equal(batch_of(store, size=8)[1], next_one.global_views)


def test_new_weights_forget_everything(store, make_example):
    example = make_example(*[(0, 0)] * 6, 3)
    digests = view_digests(example)
    assert store.hold(example, digests)
    store.next_batch(dict.fromkeys(VIEW_KINDS, 6))
    store.release(digests)
    store.forget_all()
    views = store.hold(example, digests)  # it takes all the room that there is
    assert not any(view.encoded for view in views)
    assert len(store.next_batch(dict.fromkeys(VIEW_KINDS, 6))[1]) == 6 and store.num_found == 0
