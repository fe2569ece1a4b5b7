// Structures that a kernel reads, made from what a mask keeps: csr of the mask, and the kind "groups" of a csr or bsr. Compiled
// without a tier's flags.
#pragma once
#include <cstdint>

namespace sparseprune {
// crow [rows + 1] of the entries of mask [rows, columns] that are not 0, up to 2^31 - 1 of them; returns how many there are.
int64_t count_kept(const uint8_t* mask, int64_t rows, int64_t columns, int32_t* crow);

// col and place [crow[rows]]: the column of each, and its place in the flat mask.
void list_kept(const uint8_t* mask, int64_t rows, int64_t columns, const int32_t* crow, int32_t* col, int64_t* place);

// A canonical weight [block_rows * r, block_columns * c]: r = c = 1 in csr.
struct Blocks {
  const int32_t *crow, *col;
  int64_t block_rows, blocks, block_columns, r, c;
};

// The sizes of the packed weight, which is the transposed one where `transpose` says so: sparseprune/packing/plan.py.
struct GroupsPlan {
  int64_t rows, columns, height, k_block, row_block;
  bool transpose;
};

// Writes index [entries], offsets [slots + 1, 2] and perm [entries * height] of the kind "groups", in the order that
// sparseprune/packing/groups.py lays down. std::invalid_argument where crow or col point outside of the weight.
void pack_groups(const Blocks& from, const GroupsPlan& plan, uint16_t* index, int32_t* offsets, int32_t* perm);
}  // namespace sparseprune
