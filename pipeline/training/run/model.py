"""The model that is trained: all of it, or an adapter over it."""

from typing import TYPE_CHECKING, Any

from pipeline.errors import TrainingError
from pipeline.models import Checkpoint, load_model, vocabulary_size
from pipeline.plan import LoraConfig, ModelConfig, TrainingConfig

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def trainable_model(
    start: Checkpoint,
    numerics: ModelConfig,
    config: TrainingConfig,
    device: "torch.device",
) -> "PreTrainedModel":
    """The start model in evaluation mode with what is trained of it requiring gradients.

    In evaluation mode there is no dropout, which would make the start and its reference differ at
    step 0. Weights that are trained are float32; where the start's are not, the trainer computes
    under autocast.

    Args:
        start: the model to start from.
        numerics: its dtype and attention.
        config: `method`, `lora`, `gradient_checkpointing` and `seed`, for an adapter's first
            weights.
        device: where to.

    Raises:
        TrainingError: no adapter can be put on it, or it cannot be checkpointed.
        ModelError: it cannot be loaded.
    """
    import torch

    whole = config.method == "full"
    model = load_model(
        start,
        dtype="float32" if whole else numerics.dtype,
        attention=numerics.attention,
        device=str(device),
    )
    if whole:
        model.requires_grad_(True)
    else:
        torch.manual_seed(config.seed)
        model = with_adapter(model, config.lora, str(start.path))
    if config.gradient_checkpointing:
        _checkpoint_layers(model)
    return model


def with_adapter(model: "PreTrainedModel", lora: LoraConfig, name: str) -> "PreTrainedModel":
    """A PEFT model over `model`, in evaluation mode, whose adapter changes nothing yet.

    Raises:
        TrainingError: there is nothing to put an adapter on.
    """
    import torch
    from peft import LoraConfig as PeftLora
    from peft import get_peft_model

    targets: str | list[str] = lora.target_modules
    layers = None
    if lora.last_layers is not None:
        n = model.config.num_hidden_layers
        layers = list(range(max(0, n - lora.last_layers), n))
        if targets == "all-linear":  # PEFT takes layers with names only
            body = model.base_model.named_modules()
            linear = {name for name, module in body if isinstance(module, torch.nn.Linear)}
            targets = sorted({name.rpartition(".")[2] for name in linear})
    adapter = PeftLora(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=targets,
        layers_to_transform=layers,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, adapter).eval()
    except ValueError as error:
        raise TrainingError(f"before step 1: no adapter can be put on {name}: {error}") from error


def require_vocabulary(start: Checkpoint, largest_id: int) -> None:
    """Refuse examples whose ids the model does not have, before it is loaded.

    Raises:
        TrainingError: names the id and the vocabulary's size.
    """
    size = vocabulary_size(start)
    if largest_id >= size:
        raise TrainingError(
            f"before step 1: token id {largest_id} is outside the vocabulary of {size} of "
            f"{start.path}; the sequences were made with another tokeniser"
        )


def _checkpoint_layers(model: Any) -> None:
    """Keep no activations inside a layer; they are computed anew on the way back.

    transformers does so in training mode only, which would bring dropout along: the mode of the
    layers' outer modules says so, and that of what is in them stays.

    Raises:
        TrainingError: the model does not support it.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    from pipeline.scoring.engines.forward import recomputing

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not inner.supports_gradient_checkpointing:
        raise TrainingError(
            f"before step 1: {type(inner).__name__} does not support gradient checkpointing"
        )
    inner.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": recomputing})
    for module in inner.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True
