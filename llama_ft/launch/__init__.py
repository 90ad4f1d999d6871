"""Jobs for schedulers: a recipe and its plan become a file that Slurm, SkyPilot or Kubernetes takes."""
