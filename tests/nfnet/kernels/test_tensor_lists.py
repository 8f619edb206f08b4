"""Tables of launches count in int32: what does not fit is refused, by shapes alone."""

import pytest
import torch

from nfnet.kernels import tensor_lists, triton_layers

CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", [(2**31 + 16,), (2**31 - 1,), (2, 2**31), (2**31, 1)], ids=str)
def test_a_unit_or_a_number_of_units_beyond_int32_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="spread the parameters over more processes"):
        tensor_lists.layout((torch.Size([3, 5]), torch.Size(shape)), CPU)


def test_the_longest_unit_has_its_length() -> None:
    layout = tensor_lists.layout((torch.Size([tensor_lists.MAX_LENGTH]), torch.Size([7, 2**29])), CPU)
    assert layout.sizes.tolist() == [[tensor_lists.MAX_LENGTH, 2**29], [0, 1]]
    assert all(int(tile.update_items.min()) >= 0 for tile in layout.tiles)


def test_a_weight_whose_units_are_too_long_is_refused_before_a_launch() -> None:
    pytest.importorskip("triton")
    weight = torch.empty(1, 2**16, 2**8, 2**7, device="meta")
    with pytest.raises(ValueError, match="elements of a unit"):
        triton_layers.standardise(weight, torch.empty(1, device="meta"))
