# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
# Source of kernel-builder, which reads build.toml.
{
  description = "Triton kernels of Hybrid Associative Memories";

  inputs.kernel-builder.url = "github:huggingface/kernels";

  outputs =
    { self, kernel-builder }:
    kernel-builder.lib.genKernelFlakeOutputs {
      inherit self;
      path = ./.;
    };
}
