# SPDX-License-Identifier: Apache-2.0
"""Batch norm over several processes is torch's batch norm over the whole batch."""

from __future__ import annotations

import numpy as np
import torch
from group_programs import run_group
from torch import nn
from train_ranks import BATCH_NORM_OPTIONS, batch_norm_over_ranks, batch_norm_problem, batch_norm_step

from vlmkernels.train.batch_norm import synchronize_batch_norm


def test_ranks_together_are_one_process() -> None:
    ranks = run_group(3, batch_norm_over_ranks)
    for number, options in enumerate(BATCH_NORM_OPTIONS):
        model, x, grad = batch_norm_problem(*options)
        out, grad_x = batch_norm_step(model, x, grad)
        for name, wanted in (("out", out), ("x", grad_x)):
            found = np.concatenate([rank[number][name] for rank in ranks])
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)
        expected = {name: p.grad for name, p in model.named_parameters()} | dict(model.named_buffers())
        for name, value in expected.items():
            for rank in ranks:
                np.testing.assert_allclose(
                    rank[number][name], value.numpy(), rtol=1e-12, atol=1e-12, err_msg=name
                )


def test_eval_mode_and_the_state_dict_stay() -> None:
    model, x, _ = batch_norm_problem(0.1, True)
    before, out = list(model.state_dict()), model.eval()(x)
    assert synchronize_batch_norm(model, None) == 2
    assert synchronize_batch_norm(model, None) == 2  # a second time changes the group and nothing else
    assert isinstance(model[0], nn.BatchNorm2d)
    assert list(model.state_dict()) == before
    assert torch.equal(model(x), out)
