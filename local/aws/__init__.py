"""The local AWS lives here: ministack, patched, with ECS tasks as processes; nothing of this project is."""
