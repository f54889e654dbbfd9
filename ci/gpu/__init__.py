"""Build, test and measure the kernels on a machine with a GPU, which may reach no network.

    python -m ci.gpu pack --python 3.12 --out FOLDER   anywhere: all that is needed, in a folder
    FOLDER/run STAGE                  there: build, tests, kernels, models, upstream
    FOLDER/run STAGE --rehearse       without a GPU: each stage, tiny, on a CPU
    python -m ci.gpu report OUT...    anywhere: tables and plots in ci/gpu/results

The machine needs Python with torch, triton, numpy, scipy and scikit-learn, an NVIDIA GPU and nvcc;
no network, no git and no nox. Nothing that is installed there is changed. A stage begins nothing
after 7 minutes. It keeps each row of its tables in `out/STAGE.json` of the folder, and in `$OUT`
where that is set, and goes on from there when it is run again. In a rehearsal the CUDA sources run
on an emulation, and Triton's kernels in its interpreter: it shows that the stages work, and its
times say nothing.
"""
