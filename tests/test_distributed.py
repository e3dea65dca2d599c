"""Training in two processes: DDP, FSDP2, DeepSpeed ZeRO-2 and ZeRO-3, by the config files of `examples/`.

Every launch is two processes on CPUs with gloo; what they do is in `distributed_worker.py`.
"""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import distributed_worker as worker
import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from conftest import make_config, tiny_llama, tiny_t5
from peft import PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file

from peft_residual import get_prompt_tensor, save_as_prompt_tuning


ROOT = Path(__file__).parents[1]
CONFIGS = {
    "ddp": "ddp.yaml",
    "fsdp2": "fsdp2.yaml",
    "zero2": "deepspeed_zero2.yaml",
    "zero3": "deepspeed_zero3.yaml",
}
# Modes share their processes. The last of a launch may leave its processes out of step.
LAUNCHES = (("ddp", "fsdp2", "fully_shard"), ("zero2", "zero3"))
PATIENCE = 480  # seconds for a launch that takes about 30
RUNS = [(mode, name) for mode in CONFIGS for name in worker.MODELS]
LOOPS = [("fully_shard", way) for way in worker.WAYS]


def launch_settings(mode):
    """The environment that `accelerate launch --config_file` makes of a config file."""
    path = ROOT / "examples" / "accelerate_configs" / CONFIGS[mode]
    args = launch_command_parser().parse_args(["--config_file", str(path), "train.py"])
    args, config, _ = _validate_launch_command(args)
    assert args.num_processes == 2
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(config.deepspeed_config)
        _, variables = prepare_deepspeed_cmd_env(args)
    else:
        variables = prepare_multi_gpu_env(args)
    return {name: value for name, value in variables.items() if name.startswith(("ACCELERATE_", "FSDP_"))}


def launch(folder, modes):
    """Run the worker for some modes; a hang or an error fails with what its processes printed."""
    log = folder / f"{modes[0]}.log"
    settings = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, worker.__file__, str(folder), *modes],
            env={**os.environ, **settings},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            status = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            status = f"hung for {PATIENCE} seconds"
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert status == 0, f"{modes}: {status}\n{log.read_text()[-6000:]}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Base models, an adapter for inference of each, and the settings that the processes read."""
    folder = tmp_path_factory.mktemp("distributed")
    (folder / "settings.json").write_text(json.dumps({mode: launch_settings(mode) for mode in CONFIGS}))
    torch.manual_seed(0)
    for name, build in (("t5", tiny_t5), ("llama", tiny_llama)):
        base, table = build(), build().get_input_embeddings().weight
        with torch.no_grad():  # these steep models double a rounding error at every step
            for parameter in base.parameters():
                if parameter.ndim >= 2 and parameter.shape != table.shape:
                    parameter.div_(4)
        base.save_pretrained(folder / name)
        config = make_config(task_type=worker.MODELS[name][1], prompt_tuning_init_seed=9)
        get_peft_model(base, config).save_pretrained(folder / f"{name}-frozen")
    return folder


@pytest.fixture(scope="module")
def launched(folder):
    """Launch what a mode needs, once; return the mode's folder."""
    done = {}

    def run(mode):
        modes = next(modes for modes in LAUNCHES if mode in modes)
        if modes not in done:
            done[modes] = "failed"
            launch(folder, modes)
            done[modes] = "ran"
        assert done[modes] == "ran", f"the launch of {modes} failed in the test that came first"
        return folder / mode

    return run


@pytest.fixture(scope="module")
def alone(folder):
    """The weight files that one process writes at the end, from the same global batches."""
    for name in worker.MODELS:
        worker.make_trainer(name, folder, folder / "alone" / name, use_cpu=True).train()
    return {name: weights(folder / "alone" / name / f"checkpoint-{worker.STEPS}") for name in worker.MODELS}


def weights(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    return {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}


def largest_difference(left, right):
    assert left.keys() == right.keys()
    return max(float((left[key] - right[key]).abs().max()) for key in left)


def read_report(path):
    values = torch.load(path)
    assert values.pop("world_size") == 2
    return values


# --- training -----------------------------------------------------------------------------------------------------


WRAPPERS = {"ddp": "DistributedDataParallel", "fsdp2": "FSDPPeftModelFor", "zero2": "DeepSpeedEngine"}


@pytest.mark.parametrize("mode, name", RUNS)
def test_two_processes_train_what_one_trains(mode, name, launched, alone):
    """Rows with 1 to 7 target tokens; T5 with gradient accumulation."""
    output = launched(mode) / name
    report = read_report(output / "train.pt")
    assert report["wrapper"].startswith(WRAPPERS.get(mode, WRAPPERS["zero2"]))
    assert report["partitioned"] == (mode == "zero3"), "the base model when the prompt was initialized from it"
    trained = weights(output / f"checkpoint-{worker.STEPS}")
    relative = {k: float((trained[k] - one).norm() / one.norm()) for k, one in alone[name].items()}
    assert ("base_model.model.norm.weight" in relative) == (name == "llama")
    assert max(relative.values()) <= 1e-5, relative


@pytest.mark.parametrize("mode, name", RUNS)
def test_resuming_in_new_processes_equals_never_having_stopped(mode, name, launched):
    folder = launched(mode)
    read_report(folder / f"{name}-resumed" / "resume.pt")
    halfway, straight = (weights(folder / name / f"checkpoint-{worker.STEPS // n}") for n in (2, 1))
    resumed = weights(folder / f"{name}-resumed" / f"checkpoint-{worker.STEPS}")
    assert largest_difference(straight, resumed) <= 1e-6
    assert largest_difference(straight, halfway) > 1e-2


# --- saving and loading -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode, name", RUNS + LOOPS)
def test_the_saved_prompt_is_the_one_in_use(mode, name, launched):
    output = launched(mode) / name
    report = read_report(output / "train.pt")
    saved = weights(output / "saved")
    assert (saved["prompt_embeddings"] - report["live"]["default"]).abs().max() <= 1e-6
    assert (report["exported"] - report["live"]["default"]).abs().max() <= 1e-6
    again = "by-hand" if mode in CONFIGS else "from-state-dict"
    assert largest_difference(saved, weights(output / again)) == 0


@pytest.mark.parametrize("mode, name", RUNS)
def test_a_frozen_adapter_is_served_and_saved_by_all_processes(mode, name, launched, folder):
    output, loaded = launched(mode) / name, weights(folder / f"{name}-frozen")
    report = read_report(output / "train.pt")
    assert (report["live"]["frozen"] - loaded["prompt_embeddings"]).abs().max() <= 1e-6
    assert largest_difference(weights(output / "by-hand" / "frozen"), loaded) <= 1e-6
    # The Trainer leaves frozen weights out under ZeRO-3: no half adapter is written.
    assert (output / "saved" / "frozen").exists() == (mode != "zero3")


@pytest.mark.parametrize("mode, name", RUNS)
def test_one_plain_process_loads_and_merges_what_was_saved(mode, name, launched, folder, tmp_path):
    output = launched(mode) / name
    live = read_report(output / "train.pt")["live"]["default"]
    for source in (output / "saved", save_as_prompt_tuning(output / "saved", tmp_path / "merged")):
        base = worker.MODELS[name][0].from_pretrained(folder / name)
        model = PeftModel.from_pretrained(base, source)
        assert (get_prompt_tensor(model) - live).abs().max() <= 1e-6
    assert type(model.peft_config["default"]) is PromptTuningConfig


def test_a_network_that_zero3_casts_to_bfloat16_is_computed_in_float32(launched):
    output = launched("zero3") / "bfloat16"
    report = read_report(output / "train.pt")
    assert report["dtype"] == torch.bfloat16 and report["live"].dtype == torch.float32
    assert (weights(output)["prompt_embeddings"] - report["live"]).abs().max() <= 1e-6


# --- a custom training loop ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", worker.WAYS)
def test_a_loop_with_fully_shard_resumes_and_reloads(way, launched):
    output = launched("fully_shard") / way
    assert read_report(output / "train.pt")["sharded"] == "DTensor"
    halfway = weights(output / "halfway")
    assert largest_difference(weights(output / "resumed"), weights(output / "saved")) <= 1e-6
    assert largest_difference(halfway, weights(output / "saved")) > 1e-2
    reloaded = read_report(output / "resume.pt")["reloaded"]
    assert (reloaded - halfway["prompt_embeddings"]).abs().max() <= 1e-6


def test_an_encoder_wrapped_apart_trains_the_same(launched):
    together, apart = (weights(launched("fully_shard") / way / "saved") for way in worker.WAYS)
    assert largest_difference(together, apart) <= 1e-6


# --- what cannot be done ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mode, what, message",
    [
        ("fully_shard", "save alone", r"RuntimeError: .*2 processes.*not all came within 2 seconds.*every process"),
        ("zero3", "save alone", r"RuntimeError: .*2 processes.*not all came within 2 seconds.*every process"),
        ("fully_shard", "convert", "ValueError: .*'default' are sharded.*save_as_prompt_tuning"),
        ("zero3", "convert", "ValueError: .*'default' are sharded.*save_as_prompt_tuning"),
        ("zero3", "merge", "ValueError: .*is sharded.*save_pretrained.*every process"),
        ("zero3", "load", r"ValueError: .*Adapter 'default' is sharded.*Load it before `deepspeed.initialize`"),
    ],
)
def test_what_sharded_weights_do_not_allow_raises_and_does_not_hang(mode, what, message, launched):
    refusals = torch.load(launched(mode) / "refusals.pt")
    assert re.search(message, refusals[what]), refusals[what]
