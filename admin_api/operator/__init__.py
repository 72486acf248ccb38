"""What the operator may do: `/v1/admin`, with the operator's token."""
