"""`fleet`, the operator's command. Rules of the control plane are not here: they are shared's."""
