"""Counts what the collectives of torch.distributed put on the wire."""

import math
from collections import Counter
from contextlib import contextmanager

import deepspeed
import torch
import torch.distributed as dist

CONTROL = 2  # tensors of at most so many elements are norms, flags and counts


@contextmanager
def counted():
    """Yield Counters of ring bytes sent by this rank: {"payload": {(op, ranks): bytes}, "control"}.

    all-reduce of p bytes over n ranks: 2 (n-1)/n p; all-gather and reduce-scatter: (n-1)/n p;
    all-to-all: what goes to other ranks.
    """
    sent = {"payload": Counter(), "control": Counter()}
    undo = []

    def count(name, group, numel, element_size, factor):
        ranks = tuple(dist.get_process_group_ranks(group or dist.group.WORLD))
        kind = "control" if numel <= CONTROL else "payload"
        share = (len(ranks) - 1) / len(ranks)
        sent[kind][(name, ranks)] += factor * share * numel * element_size

    def wrap(owner, attribute, name, factor):
        original = getattr(owner, attribute)

        def call(*args, **kwargs):
            tensors = [v for v in [*args, *kwargs.values()] if torch.is_tensor(v)]
            whole = max(tensors, key=torch.Tensor.numel)
            count(name, kwargs.get("group"), whole.numel(), whole.element_size(), factor)
            return original(*args, **kwargs)

        setattr(owner, attribute, call)
        undo.append((owner, attribute, original))

    backend = deepspeed.comm.comm.cdb
    wrap(dist, "all_reduce", "all_reduce", 2)
    wrap(dist, "reduce", "reduce", 1)
    wrap(dist, "broadcast", "broadcast", 1)
    wrap(backend, "all_gather_function", "all_gather", 1)
    wrap(backend, "reduce_scatter_function", "reduce_scatter", 1)
    original = dist.all_gather

    def all_gather(tensor_list, tensor, group=None, **kwargs):
        total = sum(t.numel() for t in tensor_list)
        count("all_gather", group, total, tensor.element_size(), 1)
        return original(tensor_list, tensor, group=group, **kwargs)

    dist.all_gather = all_gather
    undo.append((dist, "all_gather", original))
    exchange = dist.all_to_all_single

    def all_to_all_single(output, input, input_split_sizes=None, group=None, **kwargs):
        ranks = tuple(dist.get_process_group_ranks(group or dist.group.WORLD))
        rows = input_split_sizes or [len(input) // len(ranks)] * len(ranks)
        others = sum(rows) - rows[dist.get_rank(group)]
        kind = "payload" if input.is_floating_point() else "control"  # counts of rows to come
        nbytes = math.prod(input.shape[1:]) * input.element_size()
        sent[kind][("all_to_all", ranks)] += others * nbytes
        return exchange(output, input, input_split_sizes=input_split_sizes, group=group, **kwargs)

    dist.all_to_all_single = all_to_all_single
    undo.append((dist, "all_to_all_single", exchange))
    try:
        yield sent
    finally:
        for owner, attribute, function in undo:
            setattr(owner, attribute, function)
