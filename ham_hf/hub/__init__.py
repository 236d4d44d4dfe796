# Copyright 2026 The HAM authors. Licensed under the Apache License, Version 2.0.
"""What lies between a HAM and other checkpoints: conversion from and to them, and what the Hub shows of it."""
