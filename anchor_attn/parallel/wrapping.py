"""A wrapped decoder over several ranks: it takes the whole batch, or a rank's part of it, and computes that part.

parallelize(model, mesh) ─ proves that its loss takes shifted labels
model(**batch) ─ split_inputs: the batch becomes this rank's part ─ before_forward ─ every layer: attend_sharded
"""

import inspect
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from anchor_attn.hf.settings import SETTINGS
from anchor_attn.hf.wrapping import HANDLES, decoder_of, is_wrapped
from anchor_attn.masks import PackedLayout
from anchor_attn.parallel.balance import check_whole_documents
from anchor_attn.parallel.layout import Scheme, ShardedLayout, check_mesh, check_scheme
from anchor_attn.parallel.split import split_batch
from anchor_attn.parallel.ulysses import check_heads
from anchor_attn.rope import chooses_by_length

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

SPLITTER = "_anchor_attn_splitter"

M = TypeVar("M", bound=nn.Module)


def parallelize(
    model: M,
    mesh: "DeviceMesh",
    scheme: Scheme = "document",
    tolerance: float | None = 0.1,
    pad_to_multiple: int = 1,
) -> M:
    """Spread every row of a wrapped decoder over the ranks of a mesh.

        mesh = init_device_mesh("cuda", (4,))
        model = DistributedDataParallel(parallelize(wrap(model), mesh))       # or fully_shard
        model(**batch).loss.backward()                                        # the same batch on all four ranks

    "document" gives whole documents to ranks, each behind a copy of the anchor, and attention then exchanges nothing;
    only documents without which the ranks are not level are shared. "ulysses" shares all. The outputs are those of
    this rank's tokens; the mean over ranks of the losses, and of the gradients, as DDP and FSDP2 take it, is what one
    process computes. A batch that `split_batch` made, in a collator say, is taken as it is. `wrap` and `unwrap` undo
    it. Wrapping in DDP or FSDP2, compiling and checkpointing come before or after.

    Args:
        model: that was wrapped, or a PEFT model of one.
        mesh: the ranks that share rows, one-dimensional: `mesh["sequence"]` of a larger one.
        scheme: "document" or "ulysses".
        tolerance: as `balance_documents`: how far above the mean a rank's tokens and pairs may be. None keeps every
            document whole.
        pad_to_multiple: as `shard_layout`.

    Returns:
        The same model.

    Raises:
        ValueError: a model that is not wrapped, attends across documents under "document", has heads that do not
            divide, attention dropout, frequencies chosen by length or a router loss; an unknown scheme; or a mesh of
            several dimensions. Later, at a forward: labels for a model whose loss does not take shifted ones.
    """
    check_scheme(scheme)
    check_mesh(mesh)
    decoder = decoder_of(model)
    if not is_wrapped(decoder):
        raise ValueError(f"model must be wrapped, got a plain {type(decoder).__name__}; call wrap(model) before.")
    _refuse(decoder)
    if scheme == "document":
        check_whole_documents(vars(decoder)[SETTINGS].pattern)
    if scheme == "ulysses" or tolerance is not None:
        check_heads(decoder.config.num_attention_heads, mesh.size())
    if (former := vars(decoder).pop(SPLITTER, None)) is not None:
        former.remove()
    takes_shifted = takes_shifted_labels(decoder)

    @torch.compiler.disable(reason="anchor_attn splits batches on the host, once a forward")
    def split_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs}
        layout = given.get("document_ids")
        if layout is None:
            return None
        if given.get("output_router_logits"):
            _refuse_router_loss(module)
        if given.get("labels") is not None and not takes_shifted:
            raise ValueError(
                f"labels must be left out for {type(module).__name__}, whose loss shifts them by itself and so misses "
                "those of other ranks, got some; compute the loss from the shift_labels of split_batch."
            )
        if not isinstance(layout, ShardedLayout):
            if given.get("num_items_in_batch") is not None:
                raise ValueError(
                    "num_items_in_batch must be left out with a batch that is still whole, got one, in which every "
                    "rank counted all of it; pass batches through split_batch before they are counted."
                )
            pattern = vars(module)[SETTINGS].pattern
            parts = mesh.get_local_rank(), mesh.size(), scheme, pattern, tolerance, pad_to_multiple
            given = split_batch({name: value for name, value in given.items() if value is not None}, *parts)
        return (), {**given, "document_ids": given["document_ids"].bind(mesh)}

    handle = decoder.register_forward_pre_hook(split_inputs, prepend=True, with_kwargs=True)
    setattr(decoder, SPLITTER, handle)
    vars(decoder)[HANDLES].append(handle)  # unwrap finds it there
    return model


def takes_shifted_labels(decoder: Any) -> bool:
    """Whether a wrapped decoder's own loss is that of `shift_labels` and `num_items_in_batch`; one tiny forward.

    The label of the last token is one that no shift of `labels` could give.
    """
    if "labels" not in inspect.signature(decoder.forward).parameters:
        return False
    device, training = decoder.device, decoder.training
    tokens = (torch.arange(9, device=device) * 7 + 1)[None] % decoder.config.vocab_size
    shifted = torch.full_like(tokens, -100)
    shifted[0, -1] = 1
    layout = PackedLayout.from_lengths([[4, 4]]).to(device)
    decoder.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            out = decoder(
                input_ids=tokens,
                labels=tokens,
                position_ids=layout.position_ids(),
                document_ids=layout,
                shift_labels=shifted,
                num_items_in_batch=2,
            )
    finally:
        decoder.train(training)
    expected = torch.nn.functional.cross_entropy(out.logits[0, -1].float(), shifted[0, -1]) / 2
    return bool(torch.isclose(_loss(out), expected, rtol=1e-3))


def _loss(out: Any) -> Tensor:
    return out.loss.float() if getattr(out, "loss", None) is not None else torch.tensor(float("nan"))


def _refuse(decoder: Any) -> None:
    """Raise for models whose result depends on which tokens a rank has, past attention."""
    name, config = type(decoder).__name__, decoder.config
    if chooses_by_length(decoder):
        raise ValueError(
            f"model must have RoPE that does not depend on the length of the input, got {name} with "
            f"{config.rope_parameters}, which each rank would choose by its own tokens; extend it by another method."
        )
    if dropout := getattr(config, "attention_dropout", 0.0):
        raise ValueError(
            f"model must have no attention dropout over several ranks, got {name} with attention_dropout={dropout}; "
            "set it to 0.0."
        )
    if getattr(config, "output_router_logits", False):
        _refuse_router_loss(decoder)


def _refuse_router_loss(decoder: nn.Module) -> None:
    raise ValueError(
        f"model must leave the router's loss out, got {type(decoder).__name__} with output_router_logits=True, whose "
        "loss is not a sum over ranks; set it to False."
    )
