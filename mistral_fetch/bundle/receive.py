"""Taking a bundle's models into the cache: what is proved on the way in is published as a pull publishes it."""

from __future__ import annotations

from dataclasses import dataclass

from mistral_fetch.bundle.reader import BundledModel, BundleReader
from mistral_fetch.bundle.source import LABEL, BundleSource
from mistral_fetch.bundle.trust import Vouched, refuse_other_model, vouch_for
from mistral_fetch.config import Settings
from mistral_fetch.events import Notice, Report
from mistral_fetch.sources.base import StopSignal
from mistral_fetch.store.gc import remove_empty_partials
from mistral_fetch.store.layout import Layout
from mistral_fetch.store.lock import locked
from mistral_fetch.transfer.channels import PullResult
from mistral_fetch.transfer.execute import execute_offer
from mistral_fetch.transfer.offer import Offer
from mistral_fetch.transfer.pull import already_here


@dataclass(frozen=True)
class _Job:
    """What all models of a bundle have in common."""

    reader: BundleReader
    layout: Layout
    settings: Settings
    report: Report
    stop: StopSignal
    replace_names: bool


def import_bundle(
    reader: BundleReader, settings: Settings, report: Report, stop: StopSignal, *, replace_names: bool = False
) -> list[PullResult]:
    """Make every model of a bundle complete in the cache. Nothing happens for those that are already.

    Args:
        reader: The bundle.
        settings: Where the cache is, which keys are pinned, what assurance is demanded.
        report: Told what happens.
        stop: Set it to stop in an orderly way.
        replace_names: Let a name that stands for another model stand for the bundle's.

    Raises:
        TrustError: A model may not be believed; then none of them was begun.
        Conflict: A name stands for another model.
        MalformedBundle, IntegrityError: The bundle is damaged; what was verified is kept.
        AssuranceTooLow, StoreError, Interrupted: As for a pull.
    """
    job = _Job(reader, Layout(settings.home), settings, report, stop, replace_names)
    job.layout.check_version()
    vouched = []
    for model in reader.models:
        refuse_other_model(job.layout, model, replace_names=replace_names)
        vouched.append(vouch_for(model, settings, report))
    results = [_import_model(job, model, word) for model, word in zip(reader.models, vouched, strict=True)]
    reader.finish()
    return results


def _import_model(job: _Job, model: BundledModel, vouched: Vouched) -> PullResult:
    key = model.record.ref
    if here := _already_here(job, model):
        remove_empty_partials(job.layout, key)
        return here
    job.layout.prepare()

    def tell_owner(owner: str) -> None:
        job.report(Notice(f"waiting for {owner}"))

    timeout = job.settings.lock_timeout
    with locked(job.layout.lock(key), f"import {key}", timeout, tell_owner, job.stop.check):
        # While we waited, the other process may have done the work, or given the name to something else.
        if here := _already_here(job, model):
            return here
        refuse_other_model(job.layout, model, replace_names=job.replace_names)
        return _execute(job, model, vouched)


def _already_here(job: _Job, model: BundledModel) -> PullResult | None:
    here, record = already_here(job.layout, model.record.ref, job.settings), model.record
    is_same = here is not None and (here.content_digest, here.channel) == (record.content_digest, record.channel)
    return here if is_same else None


def _execute(job: _Job, model: BundledModel, vouched: Vouched) -> PullResult:
    record, settings = model.record, job.settings
    is_last = model.number == len(job.reader.models) - 1
    source = BundleSource(job.reader, is_last=is_last)
    offer = Offer(
        record.channel,
        record.identity,
        vouched.manifest,
        (lambda: source,),
        signed=vouched.signed,
        carried_by=LABEL,
    )
    acquired = execute_offer(
        offer,
        record.ref,
        job.layout,
        floor=settings.min_assurance,
        disk_reserve_bytes=settings.disk_reserve,
        report=job.report,
        stop=job.stop,
        lock_timeout_seconds=settings.lock_timeout,
    )
    return PullResult(
        record.ref,
        acquired.directory,
        acquired.content_digest,
        record.channel,
        acquired.assurance.label,
        was_complete=False,
        received_bytes=acquired.received_bytes,
    )
