// PyTorch's stable ABI, from the oldest torch that the binary has to load in: 2.11.
//
// The only way torch's headers come in, because TORCH_TARGET_VERSION has to be set before the first of them.
// It is no compiler flag, because module.cpp includes pybind11, whose copy in torch 2.11 refuses to be
// compiled with it.
#pragma once

#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 11) << 48))

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
