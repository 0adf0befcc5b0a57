"""Pure decisions of the coordinator: snapshot in, plan out."""
