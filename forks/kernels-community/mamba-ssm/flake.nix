{
  description = "The hub kernel mamba-ssm";

  inputs.kernel-builder.url = "github:huggingface/kernels";

  outputs =
    { self, kernel-builder }:
    kernel-builder.lib.genKernelFlakeOutputs {
      inherit self;
      path = ./.;
      # Loading it needs a GPU, for Triton's autotuning, and transformers, for MambaLMHeadModel.
      doGetKernelCheck = false;
      pythonCheckInputs = packages: [ packages.huggingface-hub packages.transformers ];
    };
}
