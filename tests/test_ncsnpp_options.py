"""NCSN++ over its options: every combination constructs, runs on tensors and on duals, and passes the adjoint identity
`<u, J v> = <J^T u, v>` in float64 with ordinary weights.

All 72 combinations of the structural options (3 kinds of blocks x 2 resamplings x 3 outputs x 4 inputs), each with 4 of
the 16 combinations of embedding, rescaling, division by sigma and conditioning; these four, and centring,
attention, dropout and the number of channels, go round so that every pair of values of any two options occurs. 288
networks.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from qcsbm_fast.dual import Dual
from qcsbm_fast.nn import NCSNpp, NCSNppConfig
from qcsbm_fast.nn.reference_weights import from_reference_state_dict, to_reference_state_dict

STRUCTURES = [
    {
        "resblock_type": blocks,
        "resamp_with_conv": conv,
        "fir": fir,
        "progressive": output,
        "progressive_input": input_,
        "progressive_combine": combine,
    }
    for (blocks, conv), fir, output, (input_, combine) in itertools.product(
        [("biggan", True), ("ddpm", True), ("ddpm", False)],
        [True, False],
        ["none", "output_skip", "residual"],
        [("none", "sum"), ("input_skip", "sum"), ("input_skip", "cat"), ("residual", "sum")],
    )
]
DETAILS = [
    dict(zip(("embedding_type", "skip_rescale", "scale_by_sigma", "conditional"), values, strict=True))
    for values in itertools.product(["fourier", "positional"], [True, False], [True, False], [True, False])
]
ROUND = [
    dict(zip(("centered", "attn_resolutions", "dropout", "num_channels"), values, strict=True))
    for values in itertools.product([False, True], [(), (2,), (4,)], [0.0, 0.2], [1, 3])
]


CODE = (0b0000, 0b0011, 0b1101, 0b1110)  # linear, each bit set in half of the words; its cosets fill the 16


def combination(structure: int, word: int) -> dict[str, Any]:
    """Options of the structure's network number `word`, 0 to 3."""
    turn = structure + structure // 4 + structure // 12  # so that no structural option keeps step with it
    detail = CODE[word] ^ (0, 1, 4, 5)[turn % 4]
    return {**STRUCTURES[structure], **DETAILS[detail], **ROUND[(7 * turn + 5 * word) % len(ROUND)]}


def ordinary_network(options: dict[str, Any], seed: int) -> NCSNpp:
    """Two levels of 4 and 2 pixels; its weights, biases too, are of order one: a fresh network is nearly linear."""
    torch.manual_seed(seed)
    config = NCSNppConfig(image_size=4, nf=4, ch_mult=(1, 2), num_res_blocks=1, init_scale=1.0, **options)
    net = NCSNpp(config).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return net


def check(options: dict[str, Any], seed: int) -> None:
    net = ordinary_network(options, seed)
    generator = torch.Generator().manual_seed(seed)
    x, u, v = torch.randn(3, 2, options["num_channels"], 4, 4, dtype=torch.float64, generator=generator)
    sigma = torch.tensor([0.3, 2.0], dtype=torch.float64)
    x.requires_grad_()
    torch.manual_seed(seed)  # of the dropout's mask
    pushed = net(Dual(x, v[None]), sigma)
    torch.manual_seed(seed)
    plain = net(x, sigma)
    torch.testing.assert_close(pushed.primal, plain, rtol=1e-11, atol=1e-11, msg=str(options))
    forward = (u * pushed.tangents[0]).sum()
    (transposed,) = torch.autograd.grad(plain, x, u)
    scale = (u.norm() * pushed.tangents[0].norm()).item()
    assert abs(forward.item() - (transposed * v).sum().item()) < 1e-11 * scale, options
    # a field near zero would pass whatever its derivatives are
    assert scale > 1e-3, options


@pytest.mark.parametrize("structure", range(len(STRUCTURES)))
def test_adjoint_identity(structure: int) -> None:
    for word in range(len(CODE)):
        check(combination(structure, word), seed=len(CODE) * structure + word)


@pytest.mark.parametrize("structure", range(len(STRUCTURES)))
def test_the_authors_names_both_ways(structure: int) -> None:
    options = combination(structure, structure % len(CODE))
    net, other = (ordinary_network(options, seed) for seed in (0, 1))
    from_reference_state_dict(other, to_reference_state_dict(net))
    for name, value in net.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def test_every_pair_of_values_occurs() -> None:
    every = [combination(s, word) for s in range(len(STRUCTURES)) for word in range(len(CODE))]
    assert len({tuple(sorted(options.items())) for options in every}) == 288
    names = [name for name in every[0] if name not in ("resamp_with_conv", "progressive_combine")]
    for first, second in itertools.combinations(names, 2):
        values = [{options[name] for options in every} for name in (first, second)]
        seen = {(options[first], options[second]) for options in every}
        assert seen == set(itertools.product(*values)), (first, second)
    details = [{tuple(options[name] for name in DETAILS[0]) for options in every if options["fir"] is fir}
               for fir in (True, False)]  # fmt: skip
    assert [len(combinations) for combinations in details] == [16, 16]
