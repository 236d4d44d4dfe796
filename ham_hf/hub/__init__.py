# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""From other checkpoints to HAMs and back, and from a HAM to the Hub: conversion, model cards, pushing."""
