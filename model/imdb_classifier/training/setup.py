"""How a run comes to be: a new classifier or the newest intact checkpoint, its data, and its optimizer."""

from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerFast

from imdb_classifier.checkpoints import checkpoint, run_folder, weights
from imdb_classifier.configuration import PRESETS, TextClassifierConfig
from imdb_classifier.data import tokenization
from imdb_classifier.data.batches import tokenize
from imdb_classifier.data.splits import Reviews
from imdb_classifier.messages import UserError
from imdb_classifier.modeling import TextClassifier
from imdb_classifier.training import guards, saving
from imdb_classifier.training.inference import resolve_attention
from imdb_classifier.training.launcher import check_batch_size
from imdb_classifier.training.run import Run
from imdb_classifier.training.watch import Watch

# They decide a run's result, so a resumed run must repeat them; how it is computed may change.
DECIDING_OPTIONS = (
    *("dataset", "text_column", "label_column", "limit", "tokenizer", "vocabulary_size", "max_length"),
    *("preset", "batch_size", "learning_rate", "seed", "group_by_length", "precision"),
)


def assemble(options: Namespace, reviews: Reviews, accelerator: Accelerator) -> Run:
    """Build model, optimizer and data, fresh or from the newest intact checkpoint."""
    check_batch_size(options.batch_size, accelerator)
    attention, reason = resolve_attention(options.attention, accelerator, options.precision)
    if options.cuda_graphs and accelerator.device.type != "cuda":
        raise UserError("--cuda-graphs needs a GPU, this run is on the CPU")
    if options.cuda_graphs and accelerator.num_processes > 1:
        raise UserError(f"--cuda-graphs is for one process, got {accelerator.num_processes}")
    settings = {name: getattr(options, name) for name in DECIDING_OPTIONS}
    # Each process draws its own dropout, so their number decides the result as well.
    settings |= {"data_sha256": reviews.fingerprint(), "processes": accelerator.num_processes}
    resumed_from = _find_checkpoint(options.output_dir, accelerator) if options.resume else None
    torch.manual_seed(options.seed)
    if resumed_from is None:
        model, tokenizer = new_classifier(options, reviews, attention)
    else:
        check_settings(resumed_from, settings)
        model, tokenizer = weights.load_classifier(resumed_from, attention, check=False)
    with accelerator.main_process_first():
        data = {
            name: tokenize(split, tokenizer, options.max_length, options.cache_dir)
            for name, split in reviews.by_name().items()
        }
    # Fused: one kernel, which heeds `found_inf`; capturable: in a CUDA graph too.
    on_gpu = accelerator.device.type == "cuda"
    rate = options.learning_rate
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, fused=True, capturable=on_gpu)
    prepared_model, prepared_optimizer = accelerator.prepare(model, optimizer)
    guards.check_optimizer(prepared_model, prepared_optimizer)
    # From here each process draws its own dropout.
    torch.manual_seed(options.seed + accelerator.process_index)
    run = Run(
        folder=options.output_dir,
        options=options,
        settings=settings,
        attention=f"{attention} ({reason})",
        accelerator=accelerator,
        model=prepared_model,
        optimizer=prepared_optimizer,
        tokenizer=tokenizer,
        data=data,
    )
    run.watch = Watch(
        optimizer,
        run.bare_model.named_parameters(),
        None if accelerator.num_processes == 1 else partial(accelerator.reduce, reduction="sum"),
        scaled=accelerator.scaler is not None,
    )
    if resumed_from is not None:
        saving.restore(run, resumed_from)
    return run


def _find_checkpoint(folder: Path, accelerator: Accelerator) -> Path:
    with accelerator.main_process_first():
        if accelerator.is_main_process:
            run_folder.adopt_copies(folder)
        return run_folder.newest_intact(folder)


def new_classifier(
    options: Namespace, reviews: Reviews, attention: str
) -> tuple[TextClassifier, PreTrainedTokenizerFast]:
    if options.tokenizer == tokenization.TRAIN:
        texts = reviews.train.texts
        tokenizer = tokenization.train_tokenizer(texts, options.vocabulary_size, options.max_length)
    else:
        tokenizer = tokenization.load_tokenizer(options.tokenizer, options.max_length)
    config = TextClassifierConfig(
        **PRESETS[options.preset],
        vocab_size=tokenization.count_ids(tokenizer),
        max_length=options.max_length,
        pad_token_id=tokenizer.pad_token_id,
    )
    return TextClassifier._from_config(config, attn_implementation=attention), tokenizer


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Raise UserError unless the checkpoint's run was started with the same settings."""
    before = checkpoint.read_json(folder / checkpoint.STATE_FILE).get("settings")
    if isinstance(before, dict):
        # Older runs could not choose.
        before = {"text_column": None, "label_column": None} | before
    if not isinstance(before, dict) or before.keys() != settings.keys():
        raise checkpoint.other_version(folder)
    no_options = {"data_sha256": "the data", "processes": "the number of processes"}
    for name, value in settings.items():
        # The same data may have moved.
        if name != "dataset" and before[name] != value:
            changed = (
                f"{no_options.get(name, '--' + name.replace('_', '-'))} was {before[name]}, now is {value}"
            )
            raise UserError(f"cannot resume: {changed}; repeat the run's own command")
