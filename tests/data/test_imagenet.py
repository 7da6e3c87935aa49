"""If these fail, a class is sampled or extracted under another one's label."""

import pytest

from iar_jax.data import imagenet
from iar_jax.runtime.errors import UserError


def test_the_classes_are_a_thousand_in_sorted_order():
    wnids = [wnid for wnid, _ in imagenet.classes()]
    assert len(set(wnids)) == 1000
    assert wnids == sorted(wnids)
    # Well-known labels: those that LlamaGen's and ADM's demos show.
    known = (207, "n02099601", "golden retriever"), (360, "n02444819", "otter"), (980, "n09472597", "volcano")
    for label, wnid, name in known:
        assert imagenet.classes()[label] == (wnid, name)
        assert imagenet.class_index(name) == imagenet.class_index(wnid) == label
    assert imagenet.class_index(" Golden Retriever ") == 207


def test_an_unknown_class_gets_the_nearest():
    with pytest.raises(UserError, match="no class 'golden retreiver'; the nearest are 'golden retriever'"):
        imagenet.class_index("golden retreiver")
    with pytest.raises(UserError, match="collie"):
        imagenet.class_index("colly")


def test_a_thousand_other_wordnet_ids_are_refused():
    names = tuple(wnid for wnid, _ in imagenet.classes())
    imagenet.check_class_order(names, "here")
    imagenet.check_class_order(names[:100], "a subset")
    with pytest.raises(UserError, match="label 3 is n01491362, ImageNet's is n01491361"):
        imagenet.check_class_order((*names[:3], "n01491362", *names[4:]), "here")
