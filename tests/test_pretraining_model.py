"""SSLAMForPreTraining at shapes that nobody published, its teacher, its checkpoints, and what a training loop relies on."""

import json

import pytest
import torch
from conftest import FIXTURES, tiny_config
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import AutoModel, AutoModelForPreTraining, Trainer, TrainingArguments

from transformers_sslam import PRETRAINING_STAGES, SSLAMConfig, SSLAMForPreTraining, SSLAMModel
from transformers_sslam.masking import inverse_block_masks
from transformers_sslam.objective_sslam import channel_std, content_share, ema_decay


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def log_mels(batch: int = 2, frames: int = 128, bins: int = 128) -> torch.Tensor:
    return torch.randn(batch, frames, bins, generator=seeded(1))


def build(**settings) -> SSLAMForPreTraining:
    """The same tiny model each time. Every weight, the teacher's too, was moved, so that what is swapped or left out shows."""
    torch.manual_seed(0)
    model = SSLAMForPreTraining(tiny_config(**{"num_views": 2, "unmixed_span_length": 32, **settings}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.train()


def snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


# --- the objective, written out


def target(model: SSLAMForPreTraining, x: torch.Tensor, num_layers: int | None, kept: list[int] | None = None) -> torch.Tensor:
    """What the teacher makes of one clip (frames, bins), perhaps hearing only the patches `kept`: (patches, width)."""
    outputs = []
    hooks = [layer.mlp.register_forward_hook(lambda *call: outputs.append(call[2][0, 1:])) for layer in model.teacher.layers]
    tokens = model.teacher.embeddings(x[None])
    tokens = tokens if kept is None else tokens[:, [0] + [1 + patch for patch in kept]]
    for layer in model.teacher.layers:
        tokens = layer(tokens)
    for hook in hooks:
        hook.remove()
    normalised = [nn.functional.instance_norm(output.T[None])[0].T for output in outputs[-(num_layers or len(outputs)) :]]
    return nn.functional.layer_norm(torch.stack(normalised).mean(0), normalised[0].shape[1:])


def predict(model: SSLAMForPreTraining, x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """CLS (width) and predictions (masked, width) of one view."""
    tokens = model.sslam.embeddings(x[None])[:, nn.functional.pad(~mask, (1, 0), value=True)]
    for layer in model.sslam.layers:
        tokens = layer(tokens)
    grid = torch.zeros(len(mask), tokens.shape[2])
    grid[~mask] = tokens[0, 1:]
    grid = grid.unflatten(0, (-1, 8)).permute(2, 0, 1)[None]
    for conv in model.decoder.layers:
        out = nn.functional.gelu(nn.functional.layer_norm(conv(grid).permute(0, 2, 3, 1), (conv.out_channels,))).permute(0, 3, 1, 2)
        grid = out + grid if out.shape == grid.shape else out
    return tokens[0, 0], model.decoder.projection(grid[0].permute(1, 2, 0).flatten(0, 1)[mask])


def written_out(model: SSLAMForPreTraining, x: torch.Tensor, masks: torch.Tensor, starts: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """The losses, a view at a time."""
    config, batch, views = model.config, len(x), len(masks) // len(x)
    local_layers, global_layers = config.local_target_layers, config.global_target_layers
    sums = dict.fromkeys(("local", "overall", "retention"), 0.0)
    size = int(masks.sum()) * (1 if starts is None else 2)

    def error(prediction, wanted):
        return (prediction - wanted).square().sum() / config.hidden_size**0.5

    for clip in range(batch):
        own, others = target(model, x[clip], local_layers), x[clip - 1]
        inputs = [x[clip]]
        if starts is not None:
            spans = starts if starts.dim() == 1 else starts[clip]
            inside = torch.zeros(x.shape[1], dtype=torch.bool)
            for start in spans.tolist():
                inside[start : start + config.unmixed_span_length] = True
            inputs.append(torch.where(inside[:, None], x[clip], torch.maximum(x[clip], others)))
            kept = [patch for patch in range(len(own)) if not inside[patch // 8 * 16]]
            foreign = own.clone()
            foreign[kept] = target(model, others, local_layers, kept)
        for half, heard in enumerate(inputs):
            local, overall = target(model, heard, local_layers), target(model, heard, global_layers).mean(0)
            for mask in masks[clip * views : (clip + 1) * views]:
                cls, prediction = predict(model, heard, mask)
                sums["local"] += error(prediction, local[mask]) / size
                sums["overall"] += error(cls, overall)
                if half == 1:
                    sums["retention"] += 2 * error(prediction, ((own + foreign) / 2)[mask]) / size
    return sums


@pytest.mark.parametrize(
    ("batch", "frames", "views", "spans", "settings"),
    [
        (3, 128, 1, [16, 80], {}),
        (2, 256, 3, [[0, 96], [64, 192]], {"hidden_size": 48, "decoder_hidden_size": 32, "global_target_layers": None}),
        (5, 96, 2, [48], {"decoder_hidden_size": 64, "local_target_layers": 1, "num_mel_bins": 128}),
        (1, 128, 4, [0, 32, 64], {"decoder_kernel_size": 5, "decoder_num_groups": 4}),
        (3, 128, 2, None, {"num_hidden_layers": 3, "global_target_layers": 2}),
    ],
)
def test_losses_are_those_of_the_objective_written_out(batch, frames, views, spans, settings):
    model = build(use_mixtures=spans is not None, mask_noise_std=0.0, **settings)
    x, starts = log_mels(batch, frames), None if spans is None else torch.tensor(spans)
    masks = inverse_block_masks(batch * views, frames // 16, 8, mask_ratio=0.7, generator=seeded())
    output = model(x, masks, starts)
    with torch.no_grad():
        expected = written_out(model, x, masks, starts)
    torch.testing.assert_close(output.local_loss, expected["local"], rtol=1e-5, atol=0)
    torch.testing.assert_close(output.global_loss, expected["overall"], rtol=1e-4, atol=0)
    if spans is None:
        assert output.source_retention_loss is None
    else:
        torch.testing.assert_close(output.source_retention_loss, expected["retention"], rtol=1e-5, atol=0)
    torch.testing.assert_close(output.loss, sum(expected.values()), rtol=1e-5, atol=0)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(("batch", "frames"), [(1, 256), (2, 1024), (3, 2048), (5, 512)])
def test_masks_and_spans_are_drawn_for_any_batch_and_length(stage, batch, frames):
    model = build(max_length=2048, num_hidden_layers=1, **{**PRETRAINING_STAGES[stage], "num_views": 3})
    output = model(log_mels(batch, frames), generator=seeded(), output_targets=True)
    patches = frames // 2
    assert output.sample_size == stage * 3 * batch * (patches - int(patches * (1 - 0.8)))
    assert output.predictions.shape == (stage * 3 * batch, patches - int(patches * (1 - 0.8)), 32)
    assert output.bool_masked_pos.shape == (3 * batch, patches)
    assert output.loss.isfinite()


def test_spans_are_shared_by_the_batch_unless_each_clip_shall_have_its_own():
    assert build()(log_mels(3), output_targets=True).unmixed_span_starts.shape == (2,)
    assert build(unmixed_spans_per_clip=True, num_unmixed_spans=1)(log_mels(3), output_targets=True).unmixed_span_starts.shape == (3, 1)


def test_the_loss_is_the_sum_of_its_weighted_parts():
    def losses(**settings):
        return build(**settings)(log_mels(), generator=seeded())

    plain = losses()
    assert torch.equal(plain.loss, plain.local_loss + plain.global_loss + plain.source_retention_loss)
    torch.testing.assert_close(plain.loss_sum / plain.sample_size, plain.loss)
    weighted = losses(global_loss_weight=0.5, source_retention_loss_weight=3.0)
    torch.testing.assert_close(weighted.global_loss, plain.global_loss * 0.5)
    torch.testing.assert_close(weighted.source_retention_loss, plain.source_retention_loss * 1.5)
    torch.testing.assert_close(weighted.loss, weighted.local_loss + weighted.global_loss + weighted.source_retention_loss)
    # Two clips, two views, two halves.
    torch.testing.assert_close(losses(global_loss_reduction="mean").global_loss, plain.global_loss / 8)


def test_only_what_is_asked_for_is_kept():
    output = build()(log_mels())
    losses = ("loss", "local_loss", "global_loss", "source_retention_loss", "loss_sum")
    assert set(output.keys()) == {*losses, "sample_size", "target_std", "prediction_std", "content_share"}
    assert all(value.numel() == 1 for value in output.values())


def test_trainer_evaluates_and_predicts(tmp_path):
    """It gathers all outputs, which have to be tensors."""
    arguments = TrainingArguments(tmp_path, per_device_eval_batch_size=2, report_to="none", use_cpu=True, disable_tqdm=True)
    clips = [{"input_values": clip} for clip in log_mels(4)]
    trainer = Trainer(build(), arguments, eval_dataset=clips, compute_metrics=lambda found: {})
    assert trainer.evaluate()["eval_runtime"] > 0
    predictions = trainer.predict(clips).predictions
    assert len(predictions) == len(build()(log_mels()))
    assert all(len(output) == 2 for output in predictions)  # one of each batch


def test_padding_yields_to_sound_when_the_mask_says_where_it_is():
    model, x, mask = build(), log_mels(), torch.ones(2, 128)
    x[:, 96:], mask[:, 96:] = 5.0, 0
    x[0, 64:], mask[0, 64:] = 5.0, 0
    starts = torch.tensor([0])
    assert (model(x, None, starts, output_targets=True).mixed_input_values[1, 64:96] == 5).all()
    assert torch.equal(model(x, None, starts, attention_mask=mask, output_targets=True).mixed_input_values[1, 64:96], x[1, 64:96])


# --- randomness


def test_one_seed_one_step():
    model = build()
    first, again, other = (model(log_mels(), generator=seeded(seed), output_targets=True) for seed in (3, 3, 4))
    assert torch.equal(first.loss, again.loss)
    assert torch.equal(first.bool_masked_pos, again.bool_masked_pos)
    assert not torch.equal(first.loss, other.loss)
    assert not torch.equal(first.bool_masked_pos, other.bool_masked_pos)


def decoder_grid(model: SSLAMForPreTraining, masks: torch.Tensor) -> torch.Tensor:
    """What the decoder is given: (views, patches, width)."""
    grids = []
    hook = model.decoder.register_forward_pre_hook(lambda module, inputs: grids.append(inputs[0].flatten(1, 2)))
    model(log_mels(), masks, generator=seeded())
    hook.remove()
    return grids[0].detach()


def test_masked_patches_are_noise_of_the_set_deviation_fresh_everywhere():
    masks = inverse_block_masks(4, 8, 8, generator=seeded())
    masked = masks.repeat(2, 1)
    noise = decoder_grid(build(mask_noise_std=0.01), masks)[masked]
    assert noise.std().item() == pytest.approx(0.01, rel=0.02)
    assert noise.mean().item() == pytest.approx(0, abs=3e-4)
    assert len(noise.flatten().unique()) > 0.99 * noise.numel(), "noise is repeated over views, patches or channels"
    silent = decoder_grid(build(mask_noise_std=0.0), masks)
    assert (silent[masked] == 0).all()
    assert (silent[~masked] != 0).all()


# --- gradients and precision


@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_reach_all_of_student_and_decoder_and_nothing_else(stage):
    model = build(**PRETRAINING_STAGES[stage])
    x = log_mels().requires_grad_()
    model(x).loss.backward()
    for name, parameter in model.named_parameters():
        if name.startswith("teacher."):
            assert not parameter.requires_grad, name
            assert parameter.grad is None, name
        else:
            assert parameter.grad.abs().sum() > 0, name
    assert not any("position" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("drops", [{}, {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2, "drop_path_rate": 0.3}], ids=str)
def test_gradient_checkpointing_changes_no_loss_and_no_gradient(precision, drops):
    """Encoder blocks and the decoder's convolutions are computed again, the teacher's blocks are not."""
    results, mask = [], torch.ones(2, 128)
    mask[0, 96:] = 0
    for checkpointing in (False, True):
        model, calls = build(**drops), []
        for name, module in model.named_modules():
            if name in ("sslam.layers.0.mlp", "decoder.layers.1", "teacher.layers.0.mlp"):
                module.register_forward_hook(lambda *_, name=name, calls=calls: calls.append(name.split(".")[0]))
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(3)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            output = model(log_mels(), attention_mask=mask, generator=seeded(), output_targets=True)
        output.loss.backward()
        results.append(output | {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad})
        # The teacher receives all clips, and the sources of the mixtures.
        assert [calls.count(name) for name in ("sslam", "decoder", "teacher")] == [1 + checkpointing, 1 + checkpointing, 2]
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


def test_bfloat16_autocast_agrees_with_float32():
    model = build()
    exact = model(log_mels(), generator=seeded())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(log_mels(), generator=seeded())
    assert rounded.loss.dtype == torch.float32
    torch.testing.assert_close(rounded.loss, exact.loss, rtol=0.02, atol=0)


@pytest.mark.parametrize("how", ["to", "half", "from_pretrained"])
def test_a_half_precision_student_keeps_its_float32_teacher(how, tmp_path):
    model = build()
    teacher, exact = snapshot(model.teacher), model(log_mels(), generator=seeded()).loss
    if how == "from_pretrained":
        model.save_pretrained(tmp_path)
        model = SSLAMForPreTraining.from_pretrained(tmp_path, dtype=torch.bfloat16).train()
    else:
        model = model.half() if how == "half" else model.to(torch.bfloat16)
    dtype = torch.float16 if how == "half" else torch.bfloat16
    assert {parameter.dtype for module in (model.sslam, model.decoder) for parameter in module.parameters()} == {dtype}
    assert_same(snapshot(model.teacher), teacher)
    output = model(log_mels().to(dtype), generator=seeded())
    assert output.loss.dtype == torch.float32
    assert output.loss.item() == pytest.approx(exact.item(), rel=0.2)  # half precision draws other noise
    output.loss.backward()
    model.update_teacher(1)
    moved = snapshot(model.teacher)
    assert all(moved[name].dtype == torch.float32 for name in teacher)
    assert not torch.equal(moved["layers.0.mlp.fc1.weight"], teacher["layers.0.mlp.fc1.weight"])


def test_compiles_as_one_graph():
    model = build(num_hidden_layers=1)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.manual_seed(0)
    expected = model(log_mels()).loss
    torch.manual_seed(0)
    torch.testing.assert_close(compiled(log_mels()).loss, expected)


@pytest.mark.parametrize("part", ["sslam", "decoder", "teacher"])
def test_parts_may_be_offloaded(part, tmp_path):
    """Accelerate fetches weights when the module that holds them is called, so none may be used past its module."""
    model = build()
    expected = model(log_mels(), generator=seeded()).loss
    model.save_pretrained(tmp_path / "model")
    places = {name: "disk" if name == part else "cpu" for name in ("sslam", "decoder", "teacher")}
    offloaded = SSLAMForPreTraining.from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "weights")
    assert next(getattr(offloaded, part).parameters()).device.type == "meta"
    with torch.no_grad():
        assert torch.equal(offloaded.train()(log_mels(), generator=seeded()).loss, expected)


def test_trains_sharded():
    """FSDP, over the modules that the model names for it."""
    plain, model = build(), build()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        for module in [module for module in model.modules() if type(module).__name__ in model._no_split_modules]:
            fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        losses = [trained(log_mels(), generator=seeded()).loss for trained in (plain, model)]
        for loss, trained in zip(losses, (plain, model)):
            loss.backward()
            trained.update_teacher(1)
        assert torch.equal(losses[0], losses[1])
        for (name, expected), actual in zip(plain.named_parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(actual.full_tensor(), expected, msg=name)
            if expected.requires_grad:
                torch.testing.assert_close(actual.grad.full_tensor(), expected.grad, msg=name)
    finally:
        torch.distributed.destroy_process_group()


# --- the teacher


def test_the_teacher_stays_frozen_when_all_is_thawed():
    model = build().requires_grad_(False).requires_grad_(True)
    trained = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"sslam", "decoder"}


def test_a_teacher_of_doubles_can_be_made_single_again():
    model = build().double()
    assert {parameter.dtype for parameter in model.teacher.parameters()} == {torch.float64}
    assert {parameter.dtype for parameter in model.half().teacher.parameters()} == {torch.float32}


def test_the_teacher_is_always_in_eval_mode():
    model = build(hidden_dropout_prob=0.5, drop_path_rate=0.5, attention_probs_dropout_prob=0.5)
    for put_in_train_mode in (model.train, model.teacher.train):
        put_in_train_mode()
        assert model.sslam.training
        assert not any(module.training for module in model.teacher.modules())
    first, second = (model(log_mels(), generator=seeded(), output_targets=True) for _ in range(2))
    assert torch.equal(first.local_targets, second.local_targets)
    assert not torch.equal(first.predictions, second.predictions), "the student's dropout is off"


@pytest.mark.parametrize(
    ("step", "decay"), [(1, 0.9998000019), (50_000, 0.999895), (100_000, 0.99999), (100_001, 0.99999), (400_000, 0.99999)]
)
def test_the_decay_is_a_linear_ramp_of_the_step(step, decay):
    assert ema_decay(step, 0.9998, 0.99999, 100_000) == pytest.approx(decay, abs=1e-12)


def test_the_teacher_moves_towards_the_student_by_the_decay_of_the_step():
    model = build(ema_decay=0.5, ema_end_decay=0.9, ema_anneal_end_step=4)
    model.sslam.embeddings.position_embeddings += 1
    for step, decay in ((2, 0.7), (9, 0.9), (2, 0.7)):
        before, student = snapshot(model.teacher), snapshot(model.sslam)
        model.update_teacher(step)
        assert_same(snapshot(model.sslam), student)
        for name, tensor in model.teacher.state_dict().items():
            expected = student[name] if "position" in name else decay * before[name] + (1 - decay) * student[name]
            torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="step is 0"):
        model.update_teacher(0)


def test_an_update_moves_a_teacher_that_bfloat16_could_not():
    model = SSLAMForPreTraining(tiny_config())
    with torch.no_grad():
        model.sslam.embeddings.layernorm.weight.fill_(2.0)
    model.update_teacher(1)
    torch.testing.assert_close(model.teacher.embeddings.layernorm.weight, torch.full((32,), 1.0002), rtol=0, atol=1e-6)


# --- initialisation and checkpoints


def test_a_new_teacher_is_a_copy_of_the_student_and_a_new_decoder_has_torchs_defaults():
    model = SSLAMForPreTraining(tiny_config(decoder_hidden_size=64))
    assert_same(snapshot(model.teacher), snapshot(model.sslam))
    assert model.teacher.layers[0].mlp.fc1.weight.data_ptr() != model.sslam.layers[0].mlp.fc1.weight.data_ptr()
    for layer, fan_in in zip((*model.decoder.layers, model.decoder.projection), (32 // 8 * 9, 64 // 8 * 9, 64)):
        for parameter in (layer.weight, layer.bias):
            assert parameter.abs().max() <= fan_in**-0.5
            assert parameter.std().item() == pytest.approx((3 * fan_in) ** -0.5, rel=0.25)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_checkpoint_gives_everything_back_bit_for_bit(stage, tmp_path):
    model = build(**PRETRAINING_STAGES[stage])
    model.save_pretrained(tmp_path)
    loaded = AutoModelForPreTraining.from_pretrained(tmp_path)
    assert type(loaded) is SSLAMForPreTraining
    assert_same(snapshot(loaded), snapshot(model))
    assert {**loaded.config.to_dict(), "_name_or_path": ""} == model.config.to_dict()
    assert {name.split(".")[0] for name in snapshot(loaded)} == {"sslam", "decoder", "teacher"}
    assert not any(parameter.requires_grad for parameter in loaded.teacher.parameters())
    assert all(parameter.requires_grad for module in (loaded.sslam, loaded.decoder) for parameter in module.parameters())
    loaded.train()
    assert torch.equal(loaded(log_mels(), generator=seeded()).loss, model(log_mels(), generator=seeded()).loss)


def test_the_encoder_of_a_checkpoint_is_the_student(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    encoder, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(encoder) is SSLAMModel
    assert_same(snapshot(encoder), snapshot(model.sslam))
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_encoder_becomes_student_and_teacher(dtype, tmp_path):
    encoder = build().sslam
    encoder.save_pretrained(tmp_path)
    model, info = SSLAMForPreTraining.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert_same(snapshot(model.sslam), {name: tensor.to(dtype) for name, tensor in snapshot(encoder).items()})
    assert_same(snapshot(model.teacher), {name: tensor.to(dtype).float() for name, tensor in snapshot(encoder).items()})
    assert not any(parameter.requires_grad for parameter in model.teacher.parameters())
    assert {name.split(".")[0] for name in info["missing_keys"]} == {"decoder", "teacher"}
    assert all(layer.weight.std() > 0.05 for layer in model.decoder.layers)


def test_stage_2_takes_over_student_decoder_and_teacher_of_stage_1(tmp_path):
    first = build(**PRETRAINING_STAGES[1])
    first.save_pretrained(tmp_path)
    second = SSLAMForPreTraining.from_pretrained(tmp_path, **PRETRAINING_STAGES[2]).train()
    assert_same(snapshot(second), snapshot(first))
    config = second.config
    assert (config.use_mixtures, config.num_views, config.global_target_layers) == (True, 8, 1)
    assert second(log_mels()).source_retention_loss > 0


def test_parts_of_a_checkpoint_that_fit_nowhere_are_reported(tmp_path):
    build(decoder_num_hidden_layers=3).save_pretrained(tmp_path)
    _, info = SSLAMForPreTraining.from_pretrained(tmp_path, decoder_num_hidden_layers=2, output_loading_info=True)
    assert info["unexpected_keys"] == {"decoder.layers.2.weight", "decoder.layers.2.bias"}


# --- collapse


def test_a_constant_shows_in_the_deviation_and_a_position_code_in_the_content_share():
    content = torch.randn(8, 64, 32, generator=seeded())
    positions = torch.randn(1, 64, 32, generator=seeded(1)).expand(8, -1, -1)
    assert channel_std(content).item() == pytest.approx(1, abs=0.01)
    assert channel_std(torch.ones(8, 64, 32)).item() == pytest.approx(1e-3)
    assert content_share(content).item() == pytest.approx(1, abs=0.01)
    assert content_share(positions).item() == 0
    assert content_share(content + positions).item() == pytest.approx(0.5, abs=0.02)
    assert content_share(content[:1]).isnan()


# --- what is refused


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"input_values": None}, "input_values is None"),
        ({"input_values": log_mels(frames=100)}, "100 frames"),
        ({"input_values": log_mels(bins=64)}, "128 mel bins"),
        ({"input_values": log_mels(frames=272)}, "272 frames, but the position table ends at 256"),
        ({"input_values": log_mels(frames=64)}, "leave nothing to mix of 64 frames"),
        ({"bool_masked_pos": torch.ones(4, 63, dtype=torch.bool)}, r"shape \(4, 63\).*\(2 \* views, 64\)"),
        ({"bool_masked_pos": torch.ones(3, 64, dtype=torch.bool)}, r"shape \(3, 64\)"),
        ({"bool_masked_pos": torch.ones(4, 64)}, "torch.float32.*torch.bool"),
        ({"bool_masked_pos": torch.ones(4, 64, dtype=torch.bool)}, "leaves 0 of 64"),
        ({"bool_masked_pos": torch.ones(4, 64, dtype=torch.bool).tril(1)}, "leaves 59, 60, 61, 62 of 64"),
        ({"unmixed_span_starts": torch.tensor([0, 8])}, r"\[0, 8\].*multiples of 16"),
        ({"attention_mask": torch.ones(2, 65)}, r"\(2, 65\)"),
        ({"attention_mask": torch.arange(128).lt(64).float().expand(2, -1) - 1}, "negative values"),
        ({"attention_mask": [[1] * 128] * 2}, "attention_mask is of type list, but a tensor is expected"),
        ({"bool_masked_pos": [[True] * 64] * 4}, "bool_masked_pos is of type list, but a tensor is expected"),
        ({"unmixed_span_starts": [0, 64]}, "unmixed_span_starts is of type list, but a tensor is expected"),
        ({"waveforms": log_mels().numpy()}, "waveforms is of type ndarray, but a tensor is expected"),
        ({"input_values": log_mels()[:0]}, "holds no clip"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        build()(**{"input_values": log_mels(), **call})


def test_a_mask_is_checked_where_nothing_is_mixed_too():
    with pytest.raises(ValueError, match=r"\(9, 9\).*\(2, 128\)"):
        build(use_mixtures=False)(log_mels(), attention_mask=torch.ones(9, 9))


def test_spans_without_mixtures_are_refused():
    with pytest.raises(ValueError, match="use_mixtures is False"):
        build(use_mixtures=False)(log_mels(), None, torch.tensor([0, 64]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decoder_num_groups": 5, "decoder_hidden_size": 40}, "hidden_size is 32 and decoder_num_groups is 5"),
        ({"global_target_layers": 3}, "global_target_layers is 3, but the encoder has 2 layers"),
    ],
)
def test_settings_that_only_pre_training_needs_leave_the_encoder_alone(settings, message):
    config = tiny_config(unmixed_span_length=1000, **settings)
    SSLAMModel(config)
    with pytest.raises(ValueError, match=message):
        SSLAMForPreTraining(config)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_views": 0},
        {"mask_ratio": 1.0},
        {"mask_ratio_adjust": 0.9},
        {"mask_noise_std": -0.1},
        {"local_target_layers": 0},
        {"ema_decay": 1.5},
        {"ema_anneal_end_step": 0},
        {"source_retention_loss_weight": -1.0},
        {"unmixed_span_length": 0},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_out_of_range_are_refused(settings):
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        SSLAMConfig(**settings)


# --- numbers of this implementation itself, for machines without the authors'


def test_losses_stay_what_they_were():
    """A regression fixture: numbers that this package computed once it agreed with the authors' code; weights and inputs are formulas."""
    model = SSLAMForPreTraining(tiny_config(num_views=2, unmixed_span_length=32, mask_noise_std=0.0))
    with torch.no_grad():
        for index, (name, tensor) in enumerate(model.state_dict().items()):
            wave = torch.sin(torch.arange(tensor.numel(), dtype=torch.float64) * (1 + index % 7) + index).view(tensor.shape)
            if "position" not in name:
                tensor.copy_(0.2 * wave + ("layernorm" in name and name.endswith("weight")))
    x = torch.sin(torch.arange(3 * 128 * 128, dtype=torch.float64).square() * 1e-4).view(3, 128, 128).float()
    masks = torch.ones(6, 64, dtype=torch.bool)
    for view in range(6):
        masks[view, (torch.arange(12) * (5 + 2 * view) + view) % 64] = False
    output = model(x, masks, torch.tensor([16, 80]))
    output.loss.backward()
    numbers = {name: value.item() if torch.is_tensor(value) else value for name, value in output.items()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "k_proj.bias" not in name:  # whose gradient is zero but for rounding
            numbers[f"gradient norm of {name}"] = parameter.grad.norm().item()
    expected = json.loads((FIXTURES / "pretraining_regression.json").read_text())
    assert numbers == pytest.approx(expected, rel=1e-4)
