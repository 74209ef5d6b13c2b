"""Running one stage on the slides of a run, so that a bad slide fails alone."""

from collections.abc import Callable, Iterator
from typing import Any

import dagster as dg
from dagster._core.definitions.data_version import (
    CODE_VERSION_TAG,
    DATA_VERSION_TAG,
    DEFAULT_DATA_VERSION,
    compute_logical_data_version,
    extract_data_version_from_entry,
    get_input_data_version_tag,
    get_input_event_pointer_tag,
)

from histoencoder_core.errors import HistoEncoderError

Metadata = dict[str, Any]


def each_slide(
    context: dg.AssetExecutionContext, work: Callable[[str], Metadata | None]
) -> Iterator[dg.MaterializeResult[None]]:
    """Run a stage on every slide of this run; the good ones are recorded when some fail.

    Dagster records all of a ranged run's partitions if the step has a result, and none if it raises
    or is cancelled. Unless all slides went well, those that did are therefore recorded one by one.
    What was computed is in the store either way.

    Args:
        context: Of the asset.
        work: Runs the stage on a slide and gives the metadata to show; None, where the asset's
            output is not required, if there is nothing to record of it.

    Yields:
        The result, if it is that of all slides.

    Raises:
        dagster.Failure: Some slides failed; it names each with its reason. It is not retried: the
            same slide would fail in the same way.
    """
    record = recorder(context)
    good: dict[str, Metadata] = {}
    bad: dict[str, str] = {}
    complete = False
    try:
        for slide_id in context.partition_keys:
            try:
                metadata = work(slide_id)
                if metadata is not None:
                    good[slide_id] = metadata
            except HistoEncoderError as error:
                context.log.error(f"{slide_id} failed: {error}")  # noqa: TRY400 - explains itself
                bad[slide_id] = str(error)
            except Exception as error:
                context.log.exception(f"{slide_id} failed")
                bad[slide_id] = f"{type(error).__name__}: {error}"
        complete = len(good) == len(context.partition_keys)
    finally:
        if not complete:
            for slide_id, metadata in good.items():
                record(slide_id, metadata)
    if bad:
        told = "; ".join(f"{slide_id}: {reason}" for slide_id, reason in bad.items())
        raise dg.Failure(
            f"{len(bad)} of {len(bad) + len(good)} slides failed. {told}",
            metadata={"failed": dg.MetadataValue.json(bad)},
            allow_retries=False,
        )
    if complete:
        _show(context, good)
        yield dg.MaterializeResult()


def recorder(context: dg.AssetExecutionContext) -> Callable[[str, Metadata], None]:
    """The function that records a slide of this asset as Dagster would, also one of no run."""
    provenance = _provenance(context)

    def record(slide_id: str, metadata: Metadata) -> None:
        context.log_event(
            dg.AssetMaterialization(
                context.asset_key, partition=slide_id, metadata=metadata, tags=provenance
            )
        )

    return record


def _show(context: dg.AssetExecutionContext, metadata: dict[str, Metadata]) -> None:
    """Give each slide's materialisation its metadata.

    As `context.add_asset_metadata` does, which reads all slides' keys from the database each time
    to see whether one is in the run's range: a tenth of a second a slide where there are 50,000.
    """
    step = context.op_execution_context.get_step_execution_context()
    accumulator = step._metadata_accumulator
    for slide_id, shown in metadata.items():
        accumulator = accumulator.with_additional_asset_metadata(
            asset_key=context.asset_key, metadata=shown, partition_key=slide_id
        )
    step._metadata_accumulator = accumulator


def _provenance(context: dg.AssetExecutionContext) -> dict[str, str]:
    """The tags by which Dagster tells what is out of date, as on the events it writes itself."""
    spec = context.assets_def.get_asset_spec(context.asset_key)
    code_version = spec.code_version or context.run_id
    tags = {CODE_VERSION_TAG: code_version}
    inputs = {}
    for key in [dep.asset_key for dep in spec.deps]:
        record = context.instance.get_latest_data_version_record(key)
        if record is not None:
            version = extract_data_version_from_entry(record.event_log_entry)
            inputs[key] = version or DEFAULT_DATA_VERSION
            tags[get_input_data_version_tag(key)] = inputs[key].value
            tags[get_input_event_pointer_tag(key)] = str(record.storage_id)
    tags[DATA_VERSION_TAG] = compute_logical_data_version(code_version, inputs).value
    return tags
