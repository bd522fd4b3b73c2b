"""The contract: where everything is in a run's folder in the bucket, and how it is named, written and read.

The folder `<run>/` is the only thing that outlives a machine. The trainer writes it, and the command line on a laptop
reads it, so this wing needs only the standard library.

    <run>/run.json                                         identity
    <run>/attempts/<attempt>/NNNN-<event>.json             one small object per event
    <run>/attempts/<attempt>/progress.json                 rewritten whole, read tolerantly
    <run>/attempts/<attempt>/metrics-<first step>.jsonl    one line per step
    <run>/checkpoints/<step>-<attempt>-<save>/             shares, state.json, then MANIFEST.json
    <run>/tokens/<key>-<attempt>/                          packed samples, then MANIFEST.json
    <run>/stop/<launch>.json                               a request to save and stop
    <run>/final/                                           the exported model, then MANIFEST.json
    <run>/tensorboard/, wandb/, trackio/                   what experiment trackers show of the run; nothing reads it

A preemption may have torn any file here, and somebody else may have written it. So nothing that is read is trusted
before it is checked, and nothing is ever unpickled.
"""
