"""The Triton kernels. Importing this package imports Triton; nothing here touches a device."""
