"""What is done: functions on data that run without Prefect."""

from infra.without_wandb import keep_wandb_out

keep_wandb_out()
