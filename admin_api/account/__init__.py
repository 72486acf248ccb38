"""What a client's own key may ask of its workspace: `/v1/account`."""
