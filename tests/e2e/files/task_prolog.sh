#!/bin/bash
# Slurm runs this as the job's user before each task; what it prints as `export K=V` goes into the task's environment.
# The nodes have no internet: uv and the runtime's Python, which SkyPilot would download, are put where it looks first.
echo "export UV_OFFLINE=1"
echo "export PATH=@BIN@:@NODE@/bin:$PATH"
# The batch script of a SkyPilot allocation, which ends in the hash of the user: its HOME and runtime folder are new.
if [ -z "$SLURM_SRUN_COMM_PORT" ] && [[ $SLURM_JOB_NAME =~ -[0-9a-f]{8}$ ]]; then
  home=@LOGIN@/.sky_clusters/$SLURM_JOB_NAME
  runtime=@NODE_TMP@/$SLURM_JOB_NAME
  mkdir -p "$home/.local/bin" "$runtime"
  ln -sfn @UV@ "$home/.local/bin/uv"
  [ -d "$runtime/skypilot-runtime" ] || cp -al @RUNTIME@ "$runtime/skypilot-runtime"
fi
exit 0
