"""What is done: functions on data that run without Prefect."""
