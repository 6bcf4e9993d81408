"""Replays recorded runs of MELO with our editor, and reports whether it agrees.

The recorded code breaks requests into tokens in its own way, and draws A from the generator of its process. A replay
takes both from the record, and leaves everything else to our editor.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from grace_bench.editing.batch import EditBatch
from grace_bench.editing.commands import Verdict
from grace_bench.editors._melo.blocks import Block
from grace_bench.editors._melo.clusters import NO_BLOCK
from grace_bench.editors._melo.record import MeloProbe, Record, Turn, initial_name, read_record
from grace_bench.editors._recordings import (
    Expectations,
    UnusableError,
    check_ids,
    load_recorded_model,
    models_folder,
    replaying,
    usable_model,
)
from grace_bench.errors import EditFailure, UserError
from grace_bench.models.editable import EditableModel
from grace_bench.models.encoding import IGNORED, EncodedBatch
from grace_bench.registry import EDITORS

# Ten times the deviations of a second implementation (docs/fidelity.md): losses and weights relative, logits absolute.
_LOSS, _WEIGHT, _LOGIT = 2.3e-4, 1.5e-4, 4.1e-4
_OPS = {"add": "add", "expand": "update", "split": "add_and_split"}
_NO_BLOCK_RECORDED = -100


def replay_file(path: Path) -> Verdict:
    """Replays a recorded run on the CPU, with one thread.

    Args:
        path: A record `<editor>/<model>/<name>.json`, with a safetensors file of the same name; the model is the
            folder `models/<model>` beside `<editor>`.

    Raises:
        OtherRecordError: If it is of another editor.
        UserError: If the record or its model is missing or damaged, naming the field.
    """
    record, tensors = read_record(path)
    with replaying(path), _editing(record, tensors, path) as editor:
        replay = _Replay(record, tensors, editor)
        try:
            replay.run()
        except UserError as error:
            raise UnusableError(f"field 'hparams.target_modules': {error}") from error
        if replay.differences:
            return Verdict(replay.differences[0])
        return replay.expected.compare(replay.numbers)


@contextmanager
def _editing(record: Record, tensors: dict[str, Tensor], path: Path) -> Iterator[Any]:
    """Our editor with the record's settings and its first A, on the model that the record was made with."""
    given = record.hparams
    config = models_folder(path) / record.model / "config.json"
    with usable_model():
        is_encoder_decoder = config.exists() and json.loads(config.read_text(encoding="utf-8")).get(
            "is_encoder_decoder"
        )
    model = load_recorded_model(
        path,
        record,
        layer=given.grace_layer,
        field="hparams.grace_layer",
        task="qa" if is_encoder_decoder else "completion",
    )
    try:
        made = EDITORS.get("melo")(
            model=model,
            layers=given.target_modules,
            n_blocks=given.num_block,
            rank_per_block=given.num_rank_per_block,
            init_radius=given.init_radius,
            n_iter=given.num_iter,
            lr=given.edit_lr,
            fidelity="reference",
        )
    except UserError as error:
        raise UnusableError(f"field 'hparams.target_modules': {error}") from error
    with made as editor:
        rank = given.num_rank_per_block
        for name, (n_in, _) in editor.blocks.sizes.items():
            found, wanted = tuple(tensors[initial_name(name)].shape), (n_in, given.num_block * rank)
            if found != wanted:
                raise UnusableError(f"field 'tensors.{initial_name(name)}': is {found}, not {wanted}")

        def recorded(index: int) -> Block:
            columns = slice(index * rank, (index + 1) * rank)
            return {
                name: (tensors[initial_name(name)][:, columns].clone(), torch.zeros(rank, n_out))
                for name, (_, n_out) in editor.blocks.sizes.items()
            }

        editor.blocks.draw = recorded
        yield editor


class _Replay:
    """Our editor on the batches and probes of a record.

    Attributes:
        expected: The recorded numbers that have a counterpart of ours.
        numbers: Ours.
        differences: Differences in what is no measurement: clusters, points, blocks.
    """

    def __init__(self, record: Record, tensors: dict[str, Tensor], editor: Any) -> None:
        self.expected = Expectations()
        self.numbers: dict[str, Tensor] = {}
        self.differences: list[str] = []
        self._record = record
        self._tensors = tensors
        self._editor = editor
        self._model: EditableModel = editor.model
        self._queries: list[Tensor] = []
        self._n_dropped = [0, 0, 0]
        # Distances are differences of queries, so that their errors are relative to the size of these.
        self._size = max((norm for turn in record.edits for norm in turn.query_norms), default=1.0)

    def run(self) -> None:
        """Makes every edit and runs every probe; ends at the first decision that differs."""
        batches = [self._encoded(index, turn) for index, turn in enumerate(self._record.edits)]
        for index, (turn, encoded) in enumerate(zip(self._record.edits, batches, strict=True)):
            self._edit(f"edit {index + 1}", turn, encoded)
            if self.differences:
                return
        for index, (answer, encoded) in enumerate(zip(self._record.history_after_all_edits, batches, strict=False)):
            where = f"the batch of edit {index + 1} after all edits"
            with torch.no_grad():
                loss = self._model.task.loss(self._model.logits(encoded), encoded)
            self._same(f"lora_blocks of {where}", answer.lora_blocks, self._chosen())
            self._close(f"loss of {where}", answer.loss, loss, _LOSS * abs(answer.loss))
        for index, probe in enumerate(self._record.probes):
            self._probe(index, probe)
        codebook = self._editor.codebook
        sums = self._record.final_cluster_label_sums
        self._same("final_cluster_label_sums", sums, [round(one) for one in codebook.label_means])
        ours = {"queries": torch.cat(self._queries), "final.cluster_centers": codebook.keys}
        for name in self._editor.blocks.sizes:
            blocks = [self._editor.blocks.block(index)[name] for index in range(len(self._editor.blocks))]
            first = self._tensors[initial_name(name)]
            trained = torch.cat([a for a, _ in blocks], dim=1)
            b = torch.cat([b for _, b in blocks])
            # The recorded tensors have the blocks that were never trained, too.
            ours[f"final.lora_A.{name}"] = torch.cat([trained, first[:, trained.shape[1] :]], dim=1)
            ours[f"final.lora_B.{name}"] = functional.pad(b, (0, 0, 0, first.shape[1] - len(b)))
        for name in ours.keys() & self._tensors.keys():
            self.numbers[name] = ours[name]
            self.expected.add_tensor(name, self._tensors[name], _WEIGHT)

    def _edit(self, where: str, turn: Turn, encoded: EncodedBatch) -> None:
        codebook, n_rows = self._editor.codebook, len(encoded)
        queries = self._editor.key_of(self._model.layer_call(encoded))
        self._queries.append(queries)
        self._close(f"query_norms at {where}", turn.query_norms, queries.norm(dim=1), _WEIGHT * self._size)
        self._same(f"search_before at {where}", turn.search_before is not None, bool(len(codebook)))
        if turn.search_before is not None and len(codebook):
            found, search = codebook.retrieve(queries), turn.search_before
            self._same(f"search_before.nearest_cluster at {where}", search.nearest_cluster, found.entry.tolist())
            name = f"search_before.smallest_distance at {where}"
            self._close(name, search.smallest_distance, found.distance, _WEIGHT * self._size)
        self._same(f"block at {where}", turn.block, len(self._editor.blocks))
        if self.differences:
            return
        try:
            self._editor.edit(EditBatch(prompts=("",) * n_rows, targets=("",) * n_rows, encoded=encoded))
        except EditFailure as failure:
            self.differences.append(f"{where} fails: {failure}")
            return
        for row, (op, ours) in enumerate(zip(turn.ops, self._editor.settled, strict=True)):
            here = f"ops.{row} at {where}"
            self._same(f"op of {here}", op.op, _OPS[ours.op])
            self._same(f"cluster of {here}", op.cluster, ours.entry)
            if ours.op == "split":
                self._same(f"nearest of {here}", op.nearest, ours.nearest)
                self._same(f"points_before of {here}", op.points_before, ours.n_points)
                # A cluster that dropped all gets a placeholder.
                self._same(f"points_after of {here}", op.points_after, max(1, ours.n_kept))
                self._close(f"distance of {here}", op.distance, torch.tensor(ours.distance), _WEIGHT * self._size)
                n_dropped = ours.n_points - ours.n_kept
                counts = (ours.n_points - max(1, ours.n_kept), n_dropped, 1)
                self._n_dropped = [sum(pair) for pair in zip(self._n_dropped, counts, strict=True)]
        recorded = [turn.forget_num, turn.forget_keys, turn.conflict_num]
        self._same(f"forget_num, forget_keys, conflict_num at {where}", recorded, self._n_dropped)
        ours = [[_recorded(block) for block in codebook.blocks_of(cluster)] for cluster in range(len(codebook))]
        self._same(f"point_blocks at {where}", turn.point_blocks, ours)
        self._close(f"radii at {where}", turn.radii, codebook.radii, _WEIGHT * self._size)
        self._close(f"center_norms at {where}", turn.center_norms, codebook.keys.norm(dim=1), _WEIGHT * self._size)
        losses = torch.tensor(self._editor.losses[:-1])
        for step, (recorded_loss, loss) in enumerate(zip(turn.losses, losses, strict=True)):
            self._close(f"losses at {where}, pass {step + 1}", recorded_loss, loss, _LOSS * abs(recorded_loss))
        self._compare_block(where, turn)

    def _compare_block(self, where: str, turn: Turn) -> None:
        first = self._editor.blocks.draw(turn.block)
        for name, (a, b) in self._editor.blocks.block(turn.block).items():
            recorded, here = turn.lora[name], f"{where}, {name}"
            change, size = recorded.A_block_change_fro, recorded.B_block_fro
            self._close(f"A_block_change_fro at {here}", change, (a - first[name][0]).norm(), _WEIGHT * change)
            self._close(f"B_block_fro at {here}", size, b.norm(), _WEIGHT * size)
            # No entry may differ by more than the whole.
            n_a, n_b = len(recorded.A_block_entries), len(recorded.B_block_entries)
            self._close(f"A_block_entries at {here}", recorded.A_block_entries, a[:n_a, 0], _WEIGHT * change)
            self._close(f"B_block_entries at {here}", recorded.B_block_entries, b[0, :n_b], _WEIGHT * size)

    @torch.no_grad()
    def _probe(self, index: int, probe: MeloProbe) -> None:
        where = f"probe {index + 1}"
        check_ids(probe.input_ids, f"probes.{index}.input_ids", self._model)
        encoded = self._inputs([probe.input_ids], [[1] * len(probe.input_ids)])
        logits = self._model.logits(encoded)[0, -1]
        self._same(f"lora_block of {where}", [probe.lora_block], self._chosen())
        found = self._editor.codebook.retrieve(self._editor.key_of(self._model.layer_call(encoded)))
        self._same(f"nearest_cluster of {where}", [probe.nearest_cluster], found.entry.tolist())
        self._close(f"smallest_distance of {where}", [probe.smallest_distance], found.distance, _WEIGHT * self._size)
        if "probe_logits_after" in self._tensors:
            row = self._tensors["probe_logits_after"][index]
            self._close(f"probe_logits_after of {where}", row, logits, _LOGIT)
        gap = float(logits.max() - logits[probe.argmax_after]) if 0 <= probe.argmax_after < len(logits) else torch.inf
        if gap > 2 * _LOGIT:
            self._same(f"argmax_after of {where}", probe.argmax_after, int(logits.argmax()))

    def _chosen(self) -> list[int]:
        """The blocks of the last sequence, as recorded."""
        return [_recorded(block) for block in self._model.last_state.memo["melo"].tolist()]

    def _encoded(self, index: int, turn: Turn) -> EncodedBatch:
        """A recorded batch."""
        field = f"edits.{index}"
        for row in turn.input_ids:
            check_ids(row, f"{field}.input_ids", self._model)
        for row in turn.labels:
            check_ids([max(token, 0) for token in row], f"{field}.labels", self._model)
        labels = torch.tensor(turn.labels)
        if not self._model.config.is_encoder_decoder and labels.shape[1] != len(turn.input_ids[0]):
            raise UnusableError(
                f"field '{field}.labels': {labels.shape[1]} columns for {len(turn.input_ids[0])} tokens"
            )
        return self._inputs(turn.input_ids, turn.attention_mask, labels)

    def _inputs(self, ids: list[list[int]], mask: list[list[int]], labels: Tensor | None = None) -> EncodedBatch:
        """A batch of token ids with labels as the official code has them: the model shifts them itself."""
        inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        given = torch.full((len(ids), 1), IGNORED) if labels is None else labels
        if self._model.config.is_encoder_decoder:
            start = torch.full((len(ids), 1), self._model.decoder_start)
            tokens = given.masked_fill(given == IGNORED, self._model.config.pad_token_id or 0)
            inputs["decoder_input_ids"] = torch.cat([start, tokens[:, :-1]], dim=1)
        elif labels is not None:
            given = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        return EncodedBatch(
            inputs=inputs,
            query=torch.full((len(ids),), -1),
            labels=None if labels is None else given,
            target_ids=tuple(tuple(row[row != IGNORED].tolist()) for row in given),
        )

    def _same(self, name: str, recorded: Any, ours: Any) -> None:
        if recorded != ours:
            self.differences.append(f"{name}: {ours}, where {recorded} was recorded")

    def _close(self, name: str, recorded: Any, ours: Tensor, allowed: float) -> None:
        self.expected.add(name, recorded, allowed)
        self.numbers[name] = ours.detach().clone()


def _recorded(block: int) -> int:
    """A block as recorded."""
    return _NO_BLOCK_RECORDED if block == NO_BLOCK else block
