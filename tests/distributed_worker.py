"""What `test_distributed.py` runs in two processes: `python distributed_worker.py FOLDER MODE...`.

Each stage runs in a new pair of processes. They are forked from one that has imported the libraries and nothing else:
importing takes longer than all that is tested. `FOLDER/settings.json` holds, for each mode, the environment that
`accelerate launch` makes of its config file.
Adapters and reports to compare are left in `FOLDER/MODE`; nothing is compared here.
"""

import json
import os
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from conftest import make_config
from peft import PeftModel, get_peft_model
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing import start_processes
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, Trainer, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from peft_residual import (
    ResidualOptimizerFactory,
    convert_to_prompt_tuning,
    create_residual_optimizer,
    disable_base_dropout,
    get_prompt_tensor,
    save_as_prompt_tuning,
)
from peft_residual.storage import sharded as distributed


STEPS = 20  # of four rows or, for T5, of two accumulated batches of four
GLOBAL_BATCH = 4
TARGETS = (1, 5, 2, 7, 3, 1, 6, 4)  # numbers of target tokens: a mean of means would not do
RATES = {"learning_rate": 0.1, "encoder_learning_rate": 0.01}
MODELS = {"t5": (AutoModelForSeq2SeqLM, "SEQ_2_SEQ_LM", 2), "llama": (AutoModelForCausalLM, "CAUSAL_LM", 1)}


# --- the same in one process and in several -----------------------------------------------------------------------


def rows(name):
    """32 rows with targets of different lengths."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for length in TARGETS * 4:
        ids = torch.randint(3, 64, (8,), generator=generator)
        labels = torch.full((8,), -100)
        labels[:length] = ids[:length] if name == "t5" else labels[:length]
        if name == "llama":
            labels[-length:] = ids[-length:]
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return made


def build_model(name, folder):
    """The base model with a new adapter (for Llama, norms are in `modules_to_save`) and one loaded for inference."""
    model_class, task_type, _ = MODELS[name]
    heads = ["norm"] if name == "llama" else None
    config = make_config(task_type=task_type, prompt_tuning_init_seed=1, modules_to_save=heads)
    model = get_peft_model(model_class.from_pretrained(folder / name), config)
    model.load_adapter(folder / f"{name}-frozen", "frozen")
    disable_base_dropout(model)
    return model


def make_trainer(name, folder, output, processes=1, **overrides):
    """A Trainer whose steps see the same rows, whatever the number of processes."""
    values = {
        "output_dir": str(output),
        "max_steps": STEPS,
        "save_steps": STEPS // 2,
        "per_device_train_batch_size": GLOBAL_BATCH // processes,
        "gradient_accumulation_steps": MODELS[name][2],
        "lr_scheduler_type": "cosine",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 11,
    }
    arguments = TrainingArguments(**{**values, **overrides})
    if arguments.deepspeed_plugin is not None:
        config = arguments.deepspeed_plugin.hf_ds_config.config
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # partition such small weights, too
    model = build_model(name, folder)
    return Trainer(
        model,
        arguments,
        train_dataset=rows(name),
        eval_dataset=rows(name)[:4],
        optimizer_cls_and_kwargs=(ResidualOptimizerFactory, RATES),
    )


def prompt_in_use(model, evaluate, adapter_name="default"):
    """What the frozen model gets from an adapter in a forward pass."""
    seen = []
    model.set_adapter(adapter_name)
    hook = model.prompt_encoder[adapter_name].register_forward_hook(lambda *call: seen.append(call[-1].detach().cpu()))
    evaluate()
    hook.remove()
    model.set_adapter("default")
    return seen[-1].clone()


# --- modes --------------------------------------------------------------------------------------------------------


def enter(mode, settings):
    """Set the process up as `accelerate launch` would; return what the TrainingArguments need to do so on CPUs."""
    for variable in [v for v in os.environ if v.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[variable]
    os.environ.update(settings)
    AcceleratorState._reset_state(reset_partial_state=True)
    if mode.startswith("zero"):
        return {"ddp_backend": "gloo"}  # accelerate takes no DeepSpeed where it is told to use CPUs
    if mode == "fsdp2":
        # accelerate takes FSDP on accelerators only; all that comes after this check runs on CPUs as well.
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        return {"accelerator_config": {"use_configured_state": True}}
    return {"use_cpu": True}


def settings_for(name, mode, settings):
    """What a mode needs for a model beyond its config file, see docs/training-at-scale.md."""
    if mode == "fsdp2" and name == "t5":
        ignored = ".*(shared|embed_tokens|lm_head)$"
        return {**settings, "FSDP_CPU_RAM_EFFICIENT_LOADING": "false", "FSDP_IGNORED_MODULES": ignored}
    return settings


def report(path, **values):
    """Leave values for the test; one process writes."""
    if dist.get_rank() == 0:
        torch.save({"world_size": dist.get_world_size(), **values}, path)
    dist.barrier()


def train_with_trainer(folder, mode, settings):
    """Train, save in every way, and report what the frozen model gets."""
    for name in MODELS:
        arguments = enter(mode, settings_for(name, mode, settings))
        output = folder / mode / name
        trainer = make_trainer(name, folder, output, processes=2, **arguments)
        table = trainer.model.get_input_embeddings().weight
        trainer.train()
        model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
        live = {adapter: prompt_in_use(model, trainer.evaluate, adapter) for adapter in ("default", "frozen")}
        trainer.save_model(output / "saved")
        model.save_pretrained(output / "by-hand", is_main_process=dist.get_rank() == 0)
        report(
            output / "train.pt",
            live=live,
            exported=get_prompt_tensor(model),
            wrapper=type(trainer.model_wrapped).__name__,
            partitioned=hasattr(table, "ds_id"),
        )
    if mode == "zero3":
        train_with_deepspeed_in_bfloat16(folder, mode)


def train_with_deepspeed_in_bfloat16(folder, mode):
    """DeepSpeed's own loop: a model that was not partitioned before is cast when it is, and the prompt with it."""
    import deepspeed

    unset_hf_deepspeed_config()  # or transformers partitions what it reads afterwards
    model = build_model("t5", folder)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=create_residual_optimizer(model, **RATES), config=config)
    batch = local_batches()[0]
    for _ in range(3):
        engine.backward(engine(**batch).loss)
        engine.step()
    live = prompt_in_use(model.eval(), lambda: engine(**batch))
    model.save_pretrained(folder / mode / "bfloat16", is_main_process=dist.get_rank() == 0)
    dtype = model.prompt_encoder["default"].embedding.weight.dtype
    report(folder / mode / "bfloat16" / "train.pt", live=live, dtype=dtype)


def resume_with_trainer(folder, mode, settings):
    """Resume from the checkpoint halfway, in processes that have no state of the first run."""
    for name in MODELS:
        arguments = enter(mode, settings_for(name, mode, settings))
        output, checkpoint = folder / mode / f"{name}-resumed", folder / mode / name / f"checkpoint-{STEPS // 2}"
        trainer = make_trainer(name, folder, output, processes=2, **arguments)
        trainer.train(resume_from_checkpoint=str(checkpoint))
        report(output / "resume.pt")
    if mode == "zero3":
        model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
        saved = folder / mode / "llama" / "saved"
        errors = {
            "load": refusal(lambda: model.load_adapter(saved, "default")),
            "merge": refusal(lambda: save_as_prompt_tuning(model, folder / mode / "merged")),
            "convert": refusal(lambda: convert_to_prompt_tuning(model)),
        }
        refuse_to_save_alone(model, folder / mode, errors)


# --- torch's `fully_shard` in a custom training loop --------------------------------------------------------------


GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True)
WAYS = ("together", "apart")


def shard(model, way):
    """Wrap the prompt's encoder by itself, or let it belong to the model's own group."""
    if way == "apart":
        fully_shard(model.prompt_encoder["default"])
    for block in [*model.base_model.encoder.block, *model.base_model.decoder.block]:
        fully_shard(block)
    fully_shard(model)
    return create_residual_optimizer(model, **RATES)


def local_batches():
    """Eight batches of two rows; each process takes every other row."""
    mine = rows("t5")[dist.get_rank() :: 2]
    return [{k: torch.stack([row[k] for row in mine[i : i + 2]]) for k in mine[0]} for i in range(0, 16, 2)]


def take_steps(model, optimizer, steps):
    """One step for each of the numbered batches."""
    batches = local_batches()
    model.train()
    for step in steps:
        model(**batches[step]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return batches[0]


def train_in_a_loop(folder, mode, settings):
    """Train, save halfway with the optimizer's state, train on, save in two ways."""
    for way in WAYS:
        output = folder / mode / way
        model = build_model("t5", folder)
        optimizer = shard(model, way)
        take_steps(model, optimizer, range(4))
        is_main = dist.get_rank() == 0
        model.save_pretrained(output / "halfway", is_main_process=is_main)
        state = get_optimizer_state_dict(model, optimizer, options=GATHERED)
        report(output / "halfway" / "optimizer.pt", optimizer=state)
        batch = take_steps(model, optimizer, range(4, 8))
        live = prompt_in_use(model.eval(), torch.no_grad()(lambda model=model, batch=batch: model(**batch)))
        model.save_pretrained(output / "saved", is_main_process=is_main)
        gathered = get_model_state_dict(model, options=GATHERED)
        if is_main:
            model.save_pretrained(output / "from-state-dict", state_dict=gathered)
        sharded = type(model.prompt_encoder["default"].embedding.weight).__name__
        report(output / "train.pt", live={"default": live}, exported=get_prompt_tensor(model), sharded=sharded)


def resume_in_a_loop(folder, mode, settings):
    """Resume from halfway; then load the end into a live, sharded model."""
    for way in WAYS:
        output = folder / mode / way
        base = MODELS["t5"][0].from_pretrained(folder / "t5")
        model = PeftModel.from_pretrained(base, output / "halfway", is_trainable=True)
        disable_base_dropout(model)
        optimizer = shard(model, way)
        state = torch.load(output / "halfway" / "optimizer.pt")["optimizer"]
        set_optimizer_state_dict(model, optimizer, state, options=GATHERED)
        batch = take_steps(model, optimizer, range(4, 8))
        model.save_pretrained(output / "resumed", is_main_process=dist.get_rank() == 0)
        model.load_adapter(output / "halfway", "default", is_trainable=True)
        reloaded = prompt_in_use(model.eval(), torch.no_grad()(lambda model=model, batch=batch: model(**batch)))
        report(output / "resume.pt", reloaded=reloaded)
    fresh = build_model("t5", folder)
    shard(fresh, "apart")
    errors = {"convert": refusal(lambda: convert_to_prompt_tuning(fresh))}
    refuse_to_save_alone(fresh, folder / mode, errors)


# --- what cannot be done ------------------------------------------------------------------------------------------


def refusal(call):
    """The message of the error that a call is refused with."""
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def refuse_to_save_alone(model, folder, errors):
    """Save in the main process only: the last thing that these processes do, since they are out of step then."""
    distributed.PATIENCE = timedelta(seconds=2)
    done = folder / "refusals.pt"
    if dist.get_rank() == 0:
        errors["save alone"] = refusal(lambda: model.save_pretrained(folder / "alone"))
        torch.save(errors, done.with_suffix(".part"))
        done.with_suffix(".part").rename(done)
    while not done.exists():
        time.sleep(0.1)


STAGES = {
    "train": lambda mode: train_in_a_loop if mode == "fully_shard" else train_with_trainer,
    "resume": lambda mode: resume_in_a_loop if mode == "fully_shard" else resume_with_trainer,
}


def run_stage(rank, stage, folder, modes, port):
    """Run one stage of some modes in a process of two; the last mode may leave the processes out of step."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    settings = json.loads((folder / "settings.json").read_text())
    for mode in modes:
        print(f"{stage}: {mode}", flush=True)
        (folder / mode).mkdir(exist_ok=True)
        STAGES[stage](mode)(folder, mode, settings.get(mode, {}))


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def main(folder, *modes):
    """Run all stages of some modes, each in two new processes."""
    if any(mode.startswith("zero") for mode in modes):
        import deepspeed

        # Gloo does without it, and compiling it takes a minute on a new machine.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for stage in STAGES:
        start_processes(run_stage, (stage, Path(folder), modes, free_port()), nprocs=2, start_method="fork")


if __name__ == "__main__":
    main(*sys.argv[1:])
