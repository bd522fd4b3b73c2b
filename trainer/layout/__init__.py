"""The contract: where everything lies in a run's folder in the bucket, and how it is named, written and read.

The folder `<run>/` is the only thing that outlives a machine. The trainer writes it, the command line on a laptop
reads it, so this wing needs nothing but the standard library.

    <run>/run.json                                         identity
    <run>/attempts/<attempt>/NNNN-<event>.json             one small object an event
    <run>/attempts/<attempt>/progress.json                 rewritten whole, read tolerantly
    <run>/attempts/<attempt>/metrics-<first step>.jsonl    a line a step
    <run>/checkpoints/<step>-<attempt>-<save>/             shares, state.json, then MANIFEST.json
    <run>/tokens/<key>-<attempt>/                          packed samples, then MANIFEST.json
    <run>/stop/<launch>.json                               a request to save and stop
    <run>/final/                                           the exported model, then MANIFEST.json

Whatever is read here may have been torn by a preemption or written by somebody else: nothing that is read is trusted
before it is checked, and nothing is ever unpickled.
"""
